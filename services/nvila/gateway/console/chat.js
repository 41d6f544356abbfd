// Questions about a recording: short ones are a chat whose answer streams, long ones are jobs whose findings come in.

import { events, follow, post, request } from "./api.js";
import { clock, parseClock, timeButton, withTimes } from "./time.js";

const AROUND_S = 60;
const MOST_TURNS = 8;
const WORDS = { when: "What should be looked for?", chat: "What happens here?", ask: "What happens here?" };

export class Chat {
  constructor(root, { recording, position, seek, window, found, say }) {
    Object.assign(this, { recording, position, seek, showWindow: window, found, say });
    this.$ = (selector) => root.querySelector(selector);
    this.talk = this.$(".talk");
    this.question = this.$("#question");
    this.history = [];
    this.asking = null;
    this.$(".ask").addEventListener("submit", (event) => (event.preventDefault(), this.send()));
    this.$(".ask").addEventListener("change", () => this.choose());
    this.$(".stop").addEventListener("click", () => this.stop());
    this.question.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    this.choose();
  }

  close() {
    this.asking?.abort();
  }

  choose() {
    const kind = this.$(".kind").value;
    const isAsked = kind in WORDS;
    this.question.hidden = !isAsked;
    this.question.placeholder = WORDS[kind] ?? "";
    this.$(".send").textContent = isAsked ? "Ask" : "Make it";
    this.$(".bounds").hidden = this.$(".where").value !== "window";
    const { window } = this.bounds();
    this.$(".estimate").textContent = "";
    this.showWindow(window?.start_s ?? null, window?.end_s ?? null);
  }

  bounds() {
    const where = this.$(".where").value;
    if (where === "all") return { window: {} };
    if (where === "around") {
      const at = this.position();
      return { window: { start_s: Math.max(0, at - AROUND_S), end_s: Math.max(at + AROUND_S, AROUND_S) } };
    }
    const [from, to] = [this.$(".from").value, this.$(".to").value].map((text) => (text.trim() ? parseClock(text) : undefined));
    if (from === null || to === null) return { wrong: "Give times as minutes:seconds, such as 12:30." };
    return { window: { ...(from !== undefined && { start_s: from }), ...(to !== undefined && { end_s: to }) } };
  }

  async send() {
    if (this.asking) return;
    const kind = this.$(".kind").value;
    const text = this.question.value.trim();
    const { window, wrong } = this.bounds();
    const isMissing = kind in WORDS && !text;
    if (wrong || isMissing) {
      this.$(".estimate").textContent = wrong ?? "Write a question first.";
      (isMissing ? this.question : this.$(".from")).focus();
      return;
    }
    this.showWindow(window.start_s ?? null, window.end_s ?? null);
    this.$(".estimate").textContent = "";
    this.question.value = "";
    const asked = text || { summary: "Summary", timeline: "Timeline of events" }[kind];
    this.turn("asked", `You${place(window)}`).text.textContent = kind === "when" ? `When: ${asked}` : asked;
    const answer = this.turn("answer working", "nvila");
    this.asking = new AbortController();
    this.$(".stop").hidden = false;
    this.$(".send").disabled = true;
    try {
      await (kind === "chat" ? this.chatOrJob(asked, window, answer) : this.job(kind, text, window, answer));
    } catch (error) {
      if (error.name === "AbortError") answer.note("Stopped.");
      else {
        answer.box.classList.add("failed");
        answer.text.textContent = error.message;
      }
    } finally {
      answer.box.classList.remove("working");
      this.asking = null;
      this.$(".stop").hidden = true;
      this.$(".estimate").textContent = "";
      this.$(".send").disabled = false;
      this.bottom();
    }
  }

  async stop() {
    const job = this.running;
    this.asking?.abort();
    if (job) await post(`/v1/jobs/${job}/cancel`).catch(() => {});
  }

  // -- a chat

  // What is too long for one request is asked as a job, which has the time for it.
  async chatOrJob(text, window, answer) {
    try {
      await this.chat(text, window, answer);
    } catch (error) {
      if (!["limit_exceeded", "deadline_exceeded"].includes(error.code)) throw error;
      answer.text.textContent = "";
      await this.job("ask", text, window, answer);
    }
  }

  async chat(text, window, answer) {
    const part = { type: "recording", recording: { id: this.recording().id, ...window } };
    const messages = [...this.history.slice(-2 * MOST_TURNS), { role: "user", content: [part, { type: "text", text }] }];
    const body = { messages, stream: true, stream_options: { include_usage: true } };
    const headers = { "Content-Type": "application/json" };
    const signal = this.asking.signal;
    const response = await request("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
    let said = "";
    let coverage = null;
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw Object.assign(new Error(chunk.error.message), { code: chunk.error.code });
      said += chunk.choices?.[0]?.delta?.content ?? "";
      coverage = chunk.coverage ?? coverage;
      answer.text.textContent = said.trimStart();
      this.bottom();
    }
    if (!said.trim()) throw new Error("The answer broke off before it began.");
    this.history.push({ role: "user", content: text }, { role: "assistant", content: said });
    this.finish(answer, said.trim(), coverage);
  }

  finish(answer, said, coverage) {
    answer.text.replaceChildren(withTimes(said, this.endS(), this.seek));
    for (const media of coverage?.media ?? []) {
      answer.note(standsOn(media), media.gaps.length > 0 || media.frames_dropped > 0);
    }
    this.say(said);
  }

  // -- a job

  async job(kind, text, window, answer) {
    const params = text ? { question: text } : {};
    const headers = { "Idempotency-Key": crypto.randomUUID?.() ?? String(Math.random()).slice(2) };
    const job = await post("/v1/jobs", { kind, recording: this.recording().id, window, params }, { headers, signal: this.asking.signal });
    this.running = job.id;
    const parts = document.createElement("ol");
    parts.className = "parts";
    answer.box.append(parts);
    try {
      for await (const event of follow(job.id, this.asking.signal)) this.heard(event, answer, parts);
      const done = await (await request(`/v1/jobs/${job.id}`)).json();
      this.over(done, answer, parts);
    } finally {
      this.running = null;
    }
  }

  heard({ kind, data }, answer, parts) {
    const words = data.text ?? data.label;
    if (kind === "progress") {
      answer.who.textContent = `nvila · ${progressText(data)}`;
      this.$(".estimate").textContent = progressText(data);
    }
    else if (["chunk", "part", "section", "interval", "event"].includes(kind) && data.start_s !== undefined && (words || kind === "interval")) {
      const line = document.createElement("li");
      const span = document.createElement("span");
      span.append(withTimes(words ?? "", this.endS(), this.seek));
      line.append(timeButton(data.start_s, `${clock(data.start_s)}–${clock(data.end_s)}`, this.seek), span);
      if (kind === "event" || kind === "interval" || kind === "section") parts.dataset.final ??= this.only(parts);
      parts.append(line);
      this.bottom();
    }
  }

  // What chunks gave is replaced by what was made of it.
  only(parts) {
    parts.replaceChildren();
    return "yes";
  }

  over(job, answer, parts) {
    answer.who.textContent = "nvila";
    if (job.state === "failed") throw new Error(job.error?.message ?? "The job failed.");
    if (job.state === "cancelled") return answer.note("Stopped.");
    const result = job.result ?? {};
    const found = result.events ?? result.intervals;
    if (result.text) {
      if (parts.children.length === 1 && parts.textContent.endsWith(result.text)) parts.replaceChildren();
      answer.text.replaceChildren(withTimes(result.text, this.endS(), this.seek));
      this.say(result.text);
    } else if (found) {
      answer.text.textContent = found.length ? `${found.length} found:` : "Nothing was found in this window.";
      this.say(answer.text.textContent);
      if (found.length) this.found(found.map((one) => ({ label: job.params.question ?? "", ...one })));
    }
    const gaps = result.gaps ?? [];
    if (gaps.length) answer.note(`${gaps.length} gap${gaps.length > 1 ? "s" : ""} in this window: ${gaps.slice(0, 3).map((gap) => `${clock(gap.start_s)}–${clock(gap.end_s)}`).join(", ")}`, true);
    const link = document.createElement("button");
    link.type = "button";
    link.className = "time";
    link.textContent = "Save all findings (JSON lines)";
    link.addEventListener("click", () => this.save(job));
    answer.note(link);
  }

  async save(job) {
    const blob = await (await request(`/v1/jobs/${job.id}/results`)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${job.kind}-${job.id}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // -- how it looks

  turn(kind, name) {
    this.talk.querySelector(".empty")?.remove();
    const box = document.createElement("div");
    box.className = `turn ${kind}`;
    const who = document.createElement("div");
    who.className = "who";
    who.textContent = name;
    const text = document.createElement("div");
    text.className = "text";
    box.append(who, text);
    this.talk.append(box);
    this.bottom();
    return {
      box, who, text,
      note: (said, isWarning = false) => {
        const line = document.createElement("p");
        line.className = isWarning ? "stands warn" : "stands";
        line.append(said);
        box.append(line);
      },
    };
  }

  bottom() {
    this.talk.scrollTop = this.talk.scrollHeight;
  }

  endS() {
    return Math.max(this.recording().duration_s ?? 0, this.recording().ingested_s) + 1;
  }
}

function place({ start_s, end_s }) {
  return start_s === undefined && end_s === undefined ? "" : ` · ${clock(start_s ?? 0)}–${end_s === undefined ? "end" : clock(end_s)}`;
}

function progressText(progress) {
  const [done, all] = [progress.done ?? progress.chunks_done, progress.total ?? progress.of ?? progress.chunks];
  return done !== undefined && all ? `${done} of ${all}` : "working";
}

// What an answer stands on, in one line.
export function standsOn(media) {
  const about = media.recording;
  const said = [`${media.frames_asked} frames, ${clock(about?.start_s ?? media.start_s)}–${clock(about?.end_s ?? media.end_s)}`];
  if (about?.frames_static) said.push(`${about.frames_static} of a still scene`);
  if (media.frames_dropped) said.push(`${media.frames_dropped} could not be decoded`);
  if (about && about.plan.mode === "pooled") said.push(`averaged over ${about.plan.pool} groups`);
  if (about && about.plan.calls > 1) said.push(`${about.plan.calls} model calls`);
  if (media.frames_encoded) said.push(`${media.frames_encoded} encoded for this answer`);
  for (const gap of media.gaps.slice(0, 3)) said.push(`gap ${clock(gap.start_s)}–${clock(gap.end_s)}: ${gap.reason}`);
  return said.join(" · ");
}
