// The strip of pictures and the track below it: how far it is ingested, gaps, still scenes, events, where we are.

import { clock } from "./time.js";

const CELL_PX = 72;
const STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
const LABEL_PX = 90;

export class Timeline {
  constructor(root, seek, picture) {
    this.$ = (selector) => root.querySelector(selector);
    this.track = this.$(".track");
    this.lengthS = 0;
    this.positionS = 0;
    this.chunks = [];
    this.events = [];
    this.gaps = [];
    this.still = [];
    this.seek = seek;
    this.picture = picture;
    this.track.addEventListener("pointerdown", (event) => this.point(event));
    this.track.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.drawScale()).observe(this.track);
  }

  places() {
    return Math.max(4, Math.floor(this.track.clientWidth / CELL_PX));
  }

  setLength(lengthS, reachedS) {
    this.$(".reached").style.width = `${this.percent(reachedS, lengthS)}%`;
    if (lengthS === this.lengthS) return;
    this.lengthS = lengthS;
    this.track.setAttribute("aria-valuemax", String(Math.floor(lengthS)));
    this.drawScale();
    this.drawMarks();
    this.setPosition(this.positionS);
  }

  setMarks(gaps, still) {
    Object.assign(this, { gaps, still });
    this.drawMarks();
  }

  setEvents(events) {
    this.events = events;
    this.drawMarks();
  }

  async setChunks(chunks) {
    this.chunks = chunks;
    const cells = chunks.map((chunk) => {
      const cell = document.createElement("div");
      cell.className = "cell";
      cell.title = clock(chunk.start_s);
      cell.addEventListener("click", () => this.seek(chunk.start_s));
      return cell;
    });
    const pictures = await Promise.all(chunks.map((chunk) => this.picture(chunk.number)));
    pictures.forEach((url, at) => {
      if (!url) return;
      const image = document.createElement("img");
      image.src = url;
      image.alt = "";
      cells[at].append(image);
    });
    this.$(".strip").replaceChildren(...cells);
  }

  nearest(seconds) {
    return this.chunks.reduce((best, one) => (!best || Math.abs(one.start_s - seconds) < Math.abs(best.start_s - seconds) ? one : best), null);
  }

  setPosition(seconds) {
    this.positionS = seconds;
    this.$(".head-line").style.left = `${this.percent(seconds)}%`;
    this.track.setAttribute("aria-valuenow", String(Math.floor(seconds)));
    this.track.setAttribute("aria-valuetext", `${clock(seconds)} of ${clock(this.lengthS)}`);
  }

  showWindow(startS, endS) {
    const box = this.$(".window");
    box.hidden = startS === null;
    if (startS !== null) this.place(box, startS, endS ?? this.lengthS);
  }

  percent(seconds, lengthS = this.lengthS) {
    return lengthS ? Math.min(100, (100 * seconds) / lengthS) : 0;
  }

  place(element, startS, endS) {
    element.style.left = `${this.percent(startS)}%`;
    element.style.width = `${Math.max(0.15, this.percent(endS) - this.percent(startS))}%`;
  }

  drawMarks() {
    const mark = (kind, { start_s, end_s }, title) => {
      const made = document.createElement("div");
      made.className = `mark-${kind}`;
      made.title = `${title}, ${clock(start_s)}–${clock(end_s)}`;
      this.place(made, start_s, end_s);
      return made;
    };
    this.$(".marks").replaceChildren(
      ...this.joined(this.still).map((one) => mark("static", one, "still scene")),
      ...this.joined(this.gaps).map((one) => mark("gap", one, `gap: ${one.reason}`)),
      ...this.events.map((one) => mark("event", one, one.label ?? one.text ?? "event")),
    );
  }

  // Stretches that would lie on the same pixel are drawn as one, so that a month has no more marks than an hour.
  joined(stretches) {
    const pixel = this.lengthS / (this.track.clientWidth || 1000);
    const found = [];
    for (const one of stretches) {
      const last = found.at(-1);
      const isSame = one.reason === last?.reason || one.end_s - one.start_s < pixel;
      if (last && isSame && one.start_s - last.end_s < pixel) last.end_s = Math.max(last.end_s, one.end_s);
      else found.push({ ...one });
    }
    return found;
  }

  drawScale() {
    const width = this.track.clientWidth;
    if (!this.lengthS || !width) return;
    const most = Math.max(1, Math.floor(width / LABEL_PX));
    const step = STEPS_S.find((one) => this.lengthS / one <= most) ?? this.lengthS;
    const labels = [];
    for (let at = 0; at < this.lengthS - step / 2; at += step) labels.push(at);
    labels.push(this.lengthS);
    this.$(".scale").replaceChildren(...labels.map((at) => {
      const label = document.createElement("span");
      label.textContent = clock(at);
      label.style.left = `${this.percent(at)}%`;
      return label;
    }));
  }

  point(event) {
    const to = (moved) => {
      const box = this.track.getBoundingClientRect();
      this.seek(Math.max(0, Math.min(1, (moved.clientX - box.left) / box.width)) * this.lengthS);
    };
    this.track.setPointerCapture(event.pointerId);
    to(event);
    this.track.addEventListener("pointermove", to);
    this.track.addEventListener("pointerup", () => this.track.removeEventListener("pointermove", to), { once: true });
  }

  key(event) {
    const by = { ArrowLeft: -5, ArrowRight: 5, ArrowDown: -5, ArrowUp: 5, PageDown: -60, PageUp: 60 }[event.key];
    const to = by !== undefined ? this.positionS + by : { Home: 0, End: this.lengthS }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.seek(Math.max(0, Math.min(this.lengthS, to)));
  }
}
