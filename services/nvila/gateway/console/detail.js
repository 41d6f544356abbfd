// One recording: its picture, how far it is, its timeline, and the conversation about it (`chat.js`).

import { get, post, request } from "./api.js";
import { lengthText, setText, stateText } from "./app.js";
import { Chat } from "./chat.js";
import { clock, timeButton } from "./time.js";
import { Timeline } from "./timeline.js";

const COUNTERS = {
  frames_sampled: "frames sampled",
  frames_encoded: "encoded",
  frames_static: "still, not encoded",
  frames_reused: "reused",
  frames_dropped: "dropped",
  frames_corrupt: "corrupt",
  chunks: "chunks",
  reconnects: "reconnects",
  bytes_cold: "stored, MB",
};
const NO_GAPS = "[]";
const MOST_LINES = 200;

export class Detail {
  constructor(place, recording, { gone, trouble, say }) {
    this.recording = recording;
    this.position = 0;
    this.leaving = new AbortController();
    this.pictures = new Map();
    this.film = null; // the segment that the player has, or is about to
    place.replaceChildren(document.getElementById("detail").content.cloneNode(true));
    this.root = place.firstElementChild;
    this.$ = (selector) => this.root.querySelector(selector);
    this.video = this.$("video");
    this.trouble = trouble;
    this.timeline = new Timeline(this.root, (seconds) => this.seek(seconds), (number) => this.picture(number));
    this.chat = new Chat(this.root, {
      recording: () => this.recording,
      position: () => this.position,
      seek: (seconds) => this.seek(seconds),
      window: (start, end) => this.timeline.showWindow(start, end),
      found: (events) => this.showEvents(events),
      say,
    });
    this.$(".delete").addEventListener("click", () => this.remove(gone, say));
    this.video.addEventListener("timeupdate", () => this.plays && this.move(this.film.start_s + this.video.currentTime));
    this.video.addEventListener("ended", () => this.goOn());
    this.video.addEventListener("error", () => this.unplayable());
    this.seenGaps = NO_GAPS;
    this.show();
    this.contents().catch(trouble);
  }

  close() {
    this.leaving.abort();
    this.chat.close();
    this.video.removeAttribute("src");
    for (const url of this.pictures.values()) URL.revokeObjectURL(url);
  }

  async refresh() {
    const before = this.recording;
    const signal = this.leaving.signal;
    this.recording = await get(`/v1/recordings/${before.id}`, { signal });
    this.show();
    if (before.counters.chunks !== this.recording.counters.chunks || before.state !== this.recording.state) await this.contents();
  }

  show() {
    const { recording } = this;
    setText(this.$(".name"), recording.name);
    setText(this.$(".state"), stateText(recording));
    this.$(".state").dataset.state = recording.state;
    const captured = recording.captured_at ? `from ${new Date(recording.captured_at * 1000).toLocaleString()}` : "";
    const about = [lengthText(recording), recording.source.url ?? "", captured].filter(Boolean).join(" · ");
    setText(this.$(".about"), about);
    const wrong = this.$(".trouble.inline");
    wrong.hidden = !recording.error;
    setText(wrong, recording.error?.message ?? "");
    const isOver = recording.state === "complete" || recording.state === "failed";
    this.$(".ingest").hidden = isOver;
    const progress = this.$(".ingest progress");
    recording.progress === null ? progress.removeAttribute("value") : (progress.value = recording.progress);
    const known = recording.duration_s && !recording.source.is_live;
    setText(this.$(".ingest-text"), `${clock(recording.ingested_s)}${known ? ` of ${clock(recording.duration_s)}` : ""} can be asked about`);
    this.timeline.setLength(Math.max(recording.duration_s ?? 0, recording.ingested_s), recording.ingested_s);
    this.showCounters(recording.counters);
  }

  showCounters(counters) {
    const rows = Object.entries(COUNTERS).map(([name, label]) => {
      const value = name === "bytes_cold" ? (counters[name] / 1e6).toFixed(1) : counters[name].toLocaleString();
      const row = document.createElement("div");
      row.append(element("dt", label), element("dd", value));
      return row;
    });
    this.$("dl").replaceChildren(...rows);
  }

  async contents() {
    const { id } = this.recording;
    const signal = this.leaving.signal;
    const coverage = await get(`/v1/recordings/${id}/coverage`, { signal });
    this.timeline.setMarks(coverage.gaps, coverage.static);
    const gaps = JSON.stringify(coverage.gaps);
    if (gaps !== this.seenGaps) {
      this.seenGaps = gaps;
      this.$(".gaps").hidden = !coverage.gaps.length;
      this.fill(this.$(".gaps ol"), coverage.gaps, (gap) => gap.reason);
    }
    const chunks = await this.sample(coverage.chunks, signal);
    await this.timeline.setChunks(chunks);
    this.still();
    if (!this.film && !this.isUnplayable) await this.load(this.position);
    await this.lastTimeline(signal);
  }

  // As many chunks as there are places in the strip, evenly spread, however many there are.
  async sample(count, signal) {
    const places = this.timeline.places();
    const { id } = this.recording;
    if (count <= 1000) {
      const all = (await get(`/v1/recordings/${id}/chunks?limit=1000`, { signal })).data;
      const wanted = Math.min(places, all.length);
      return Array.from({ length: wanted }, (_, at) => all[Math.floor(((at + 0.5) * all.length) / wanted)]);
    }
    const end = this.recording.ingested_s;
    const one = (at) => get(`/v1/recordings/${id}/chunks?limit=1&start_s=${(end * (at + 0.5)) / places}`, { signal });
    const pages = await Promise.all(Array.from({ length: places }, (_, at) => one(at)));
    return pages.flatMap((page) => page.data);
  }

  async picture(number) {
    if (!this.pictures.has(number)) {
      const path = `/v1/recordings/${this.recording.id}/chunks/${number}/thumbnail`;
      const response = await request(path, { signal: this.leaving.signal }).catch(() => null);
      if (!response) return null;
      this.pictures.set(number, URL.createObjectURL(await response.blob()));
    }
    return this.pictures.get(number);
  }

  // Events of the last timeline or when-question that was made of this recording.
  async lastTimeline(signal) {
    if (this.hasEvents) return;
    const jobs = await get(`/v1/jobs?recording=${this.recording.id}&state=done&kind=timeline&limit=1`, { signal });
    if (!jobs.data.length) return;
    const { result } = await get(`/v1/jobs/${jobs.data[0].id}`, { signal });
    if (result?.events?.length) this.showEvents(result.events);
  }

  showEvents(events) {
    this.hasEvents = true;
    this.timeline.setEvents(events);
    this.$(".events").hidden = !events.length;
    this.fill(this.$(".events ol"), events, (event) => event.label ?? event.text ?? "");
  }

  // The first of them, and the rest when it is asked for.
  fill(list, found, text) {
    const lines = (some) => some.map((one) => this.line(one, text(one)));
    list.replaceChildren(...lines(found.slice(0, MOST_LINES)));
    if (found.length <= MOST_LINES) return;
    const more = document.createElement("li");
    const button = element("button", `Show ${(found.length - MOST_LINES).toLocaleString()} more`);
    button.type = "button";
    button.className = "time";
    button.addEventListener("click", () => list.replaceChildren(...lines(found)));
    more.append(button);
    list.append(more);
  }

  line({ start_s, end_s }, text) {
    const item = document.createElement("li");
    item.append(timeButton(start_s, `${clock(start_s)}–${clock(end_s)}`, (at) => this.seek(at)), element("span", text));
    return item;
  }

  // -- the picture

  // Have the player show this moment: from the segment that holds it, or from the next one where nothing was recorded.
  async load(seconds, isPlaying = false) {
    const { id } = this.recording;
    const signal = this.leaving.signal;
    const wanted = (this.wanted = Symbol());
    const { data } = await get(`/v1/recordings/${id}/segments?start_s=${seconds}&limit=1`, { signal });
    if (wanted !== this.wanted) return;
    const isUpload = !this.film && this.recording.source.file_id; // which is there before a worker has begun
    const film = data[0] ?? (isUpload ? { number: 0, start_s: 0, duration_s: Infinity } : null);
    if (!film) return isPlaying ? null : this.showPictures();
    if (this.plays && film.number === this.film.number) {
      this.video.currentTime = Math.max(0, seconds - film.start_s);
      return;
    }
    try {
      const { url } = await post(`/v1/recordings/${id}/media_link?segment=${film.number}`, undefined, { signal });
      if (wanted !== this.wanted) return;
      this.film = film;
      this.plays = false;
      this.video.addEventListener("loadedmetadata", () => this.film === film && this.begin(Math.max(seconds, film.start_s), isPlaying), { once: true, signal });
      this.video.src = url;
    } catch (error) {
      if (error.status !== 404) throw error;
      this.showPictures(); // its footage is not kept any more
    }
  }

  begin(seconds, isPlaying) {
    this.video.hidden = false;
    this.$(".no-picture").hidden = this.$(".still").hidden = true;
    this.video.currentTime = seconds - this.film.start_s;
    this.plays = true;
    this.move(seconds);
    if (isPlaying) this.video.play().catch(() => {});
  }

  // The next segment, which begins where this one ends or after a gap.
  goOn() {
    const end = this.film.start_s + this.film.duration_s;
    if (end < this.recording.ingested_s) this.load(end + 0.001, true).catch(this.trouble);
  }

  showPictures() {
    this.plays = false;
    this.film = null;
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.hidden = true;
    this.still();
  }

  unplayable() {
    if (!this.video.getAttribute("src")) return;
    this.isUnplayable = true;
    this.showPictures();
    setText(this.$(".no-picture"), "This browser cannot play the file; pictures of its chunks are shown instead");
  }

  async still() {
    if (this.plays) return;
    const chunk = this.timeline.nearest(this.position);
    const url = chunk && (await this.picture(chunk.number));
    const image = this.$(".still");
    image.hidden = !url;
    this.$(".no-picture").hidden = Boolean(url);
    if (url && image.src !== url) {
      image.src = url;
      image.alt = `Picture at ${clock(chunk.start_s)}`;
    }
  }

  seek(seconds) {
    this.move(seconds);
    const { film } = this;
    if (this.plays && seconds >= film.start_s && seconds < film.start_s + film.duration_s) {
      this.wanted = null; // whatever was about to be loaded
      this.video.currentTime = seconds - film.start_s;
      return;
    }
    this.still();
    this.load(seconds, this.plays && !this.video.paused).catch(this.trouble);
  }

  move(seconds) {
    this.position = seconds;
    this.timeline.setPosition(seconds);
  }

  remove(gone, say) {
    const dialog = document.getElementById("delete-dialog");
    dialog.returnValue = "no";
    dialog.showModal();
    dialog.addEventListener("close", async () => {
      if (dialog.returnValue !== "yes") return;
      try {
        await request(`/v1/recordings/${this.recording.id}`, { method: "DELETE" });
        say(`${this.recording.name} was deleted.`);
        gone();
      } catch (error) {
        this.trouble(error);
      }
    }, { once: true });
  }
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}
