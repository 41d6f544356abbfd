// Times on a recording's clock: as people read them, as they type them, and where an answer names one.

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds + 1e-6));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

export function parseClock(text) {
  const parts = text.trim().split(":");
  if (!parts.length || parts.length > 3 || parts.some((part) => !/^\d+(\.\d+)?$/.test(part))) return null;
  return parts.reduce((sum, part) => sum * 60 + Number(part), 0);
}

const TIMES = /\b(?:(\d{1,3}):)?(\d{1,2}):(\d{2})(?!\d|:)|<?\b(\d{1,6}(?:\.\d+)?) ?(?:s|sec|seconds)\b>?|<(\d{1,6}(?:\.\d+)?)>/g;

// Text with each time as a button that seeks. Times behind the end are left as they are.
export function withTimes(text, endS, seek) {
  const made = document.createDocumentFragment();
  let at = 0;
  for (const match of text.matchAll(TIMES)) {
    const [found, h, m, s, plain, bracketed] = match;
    const seconds = s !== undefined ? (Number(h ?? 0) * 60 + Number(m)) * 60 + Number(s) : Number(plain ?? bracketed);
    if (seconds > endS) continue;
    made.append(text.slice(at, match.index), timeButton(seconds, found, seek));
    at = match.index + found.length;
  }
  made.append(text.slice(at));
  return made;
}

export function timeButton(seconds, label, seek) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "time";
  button.textContent = label ?? clock(seconds);
  button.setAttribute("aria-label", `Go to ${clock(seconds)}`);
  button.addEventListener("click", () => seek(seconds));
  return button;
}
