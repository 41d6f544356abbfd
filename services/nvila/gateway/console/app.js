// The console: which recordings there are, adding one, and the recording that is looked at (`detail.js`).

import { ApiError, get, key, post } from "./api.js";
import { Detail } from "./detail.js";
import { clock } from "./time.js";
import { upload } from "./upload.js";

const POLL_MS = 2000;
const PAGE = 50;
const LIVE = ["rtsp", "hls", "push"];
const HINTS = {
  url: "http://, https://, s3:// and other stores that the server may reach",
  rtsp: "rtsp://camera.example/stream; user and password are kept apart and never shown",
  hls: "https://… .m3u8",
};

const $ = (id) => document.getElementById(id);
let recordings = [];
let shown = PAGE;
let detail = null;
let isOff = false;

// -- what went wrong, and what a screen reader is told

export function say(text) {
  $("said").textContent = text;
}

function trouble(error) {
  if (error?.name === "AbortError") return;
  if (error?.status === 401) askKey(error.message);
  $("trouble").hidden = !error || error.status === 401;
  $("trouble").textContent = error ? error.message : "";
}

function askKey(reason) {
  if ($("key-dialog").open) return;
  $("key-wrong").hidden = !key.get();
  $("key-wrong").textContent = key.get() ? reason : "";
  $("key").value = "";
  $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", () => {
  key.set($("key").value.trim());
  begin();
});
$("sign-out").addEventListener("click", () => {
  key.forget();
  location.hash = "#/";
  location.reload();
});

// -- the list

async function refresh() {
  if (isOff) return;
  let found;
  try {
    found = await get(`/v1/recordings?limit=${shown}`);
  } catch (error) {
    if (error.status !== 404) throw error;
    isOff = true;
    $("add").disabled = true;
    setText($("list-empty"), "Recordings are not enabled on this gateway.");
    $("list-empty").hidden = false;
    return;
  }
  recordings = found.data;
  $("more").hidden = !found.has_more;
  $("list-empty").hidden = recordings.length > 0;
  draw();
}

function draw() {
  const chosen = location.hash.slice(2);
  const list = $("list");
  const had = new Map([...list.children].map((item) => [item.dataset.id, item]));
  for (const [place, recording] of recordings.entries()) {
    const item = had.get(recording.id) ?? newItem(recording.id);
    had.delete(recording.id);
    fill(item, recording, recording.id === chosen);
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
  }
  for (const item of had.values()) item.remove();
}

function newItem(id) {
  const item = document.createElement("li");
  item.dataset.id = id;
  item.innerHTML = '<a><span class="title"></span><span class="sub"><span class="state"></span><span class="length"></span></span><progress max="1"></progress></a>';
  item.querySelector("a").href = `#/${id}`;
  return item;
}

function fill(item, recording, isChosen) {
  const link = item.querySelector("a");
  const state = item.querySelector(".state");
  const progress = item.querySelector("progress");
  isChosen ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  setText(item.querySelector(".title"), recording.name);
  setText(state, stateText(recording));
  state.dataset.state = recording.state;
  setText(item.querySelector(".length"), lengthText(recording));
  progress.hidden = recording.state !== "ingesting";
  progress.value = recording.progress ?? 0;
  progress.setAttribute("aria-label", `${recording.name}: ingested`);
}

export function stateText(recording) {
  const waiting = LIVE.includes(recording.source.type) ? "waiting for its first frame" : "waiting";
  return { waiting, ingesting: "ingesting", live: "live", interrupted: "interrupted, trying again", complete: "complete", failed: "failed" }[recording.state];
}

export const lengthText = (recording) => (recording.duration_s ?? recording.ingested_s ? clock(recording.duration_s ?? recording.ingested_s) : "");

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

$("more").addEventListener("click", () => {
  shown = Math.min(shown + PAGE, 1000);
  refresh().catch(trouble);
});

// -- which recording is looked at

async function route() {
  const id = location.hash.slice(2);
  document.body.classList.toggle("on-recording", Boolean(id));
  detail?.close();
  detail = null;
  draw();
  if (!id) {
    $("main").replaceChildren(welcome());
    return;
  }
  try {
    const recording = await get(`/v1/recordings/${id}`);
    if (location.hash.slice(2) !== id) return;
    detail = new Detail($("main"), recording, { gone: () => { location.hash = "#/"; refresh().catch(trouble); }, trouble, say });
    document.title = `${recording.name} – nvila`;
    trouble(null);
  } catch (error) {
    $("main").replaceChildren();
    trouble(error);
  }
}

function welcome() {
  document.title = "nvila";
  const made = document.createElement("div");
  made.className = "welcome";
  made.innerHTML = isOff ? "<h2>No recordings</h2><p>This gateway answers questions over its API, and keeps no recordings.</p>" : "<h2>Ask your recordings</h2><p>Choose a recording, or add a video, an address or a camera. While it is taken in, you can already ask about what is there.</p>";
  return made;
}

window.addEventListener("hashchange", route);

// -- adding

const dialog = $("add-dialog");
const form = $("add-form");
let sending = null;

function chosenType() {
  return form.elements.type.value;
}

function showFields() {
  const type = chosenType();
  for (const field of form.querySelectorAll("[data-for]")) field.hidden = !field.dataset.for.split(" ").includes(type);
  $("url-hint").textContent = HINTS[type] ?? "";
}

function openAdd(file = null) {
  if (isOff) return;
  form.reset();
  if (file) {
    const carried = new DataTransfer();
    carried.items.add(file);
    $("file").files = carried.files;
  }
  $("add-wrong").hidden = $("sending").hidden = true;
  $("add-send").disabled = false;
  showFields();
  if (!dialog.open) dialog.showModal();
}

function wrong(text, field) {
  $("add-wrong").textContent = text;
  $("add-wrong").hidden = false;
  field?.focus();
}

function given(fileId) {
  const type = chosenType();
  const source = { type };
  if (type === "file") source.file_id = fileId;
  else source.url = $("url").value.trim();
  if (type === "rtsp" && $("username").value) Object.assign(source, { username: $("username").value, password: $("password").value });
  const policy = { fps: Number($("fps").value), chunk_s: Number($("chunk").value), gate: $("gate").checked };
  return { source, policy, ...($("name").value.trim() ? { name: $("name").value.trim() } : {}) };
}

form.addEventListener("change", showFields);
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const type = chosenType();
  const file = $("file").files[0];
  $("add-wrong").hidden = true;
  if (type === "file" && !file) return wrong("Choose a file first.", $("file"));
  if (type !== "file" && !$("url").value.trim()) return wrong("Give an address first.", $("url"));
  sending = new AbortController();
  $("add-send").disabled = true;
  try {
    let fileId = null;
    if (type === "file") {
      $("sending").hidden = false;
      fileId = await upload(file, showSent, sending.signal);
    }
    const made = await post("/v1/recordings", given(fileId), { signal: sending.signal });
    dialog.close();
    say(`${made.name} was added.`);
    location.hash = `#/${made.id}`;
    await refresh();
  } catch (error) {
    if (error.name !== "AbortError") wrong(error instanceof ApiError ? error.message : `It could not be sent: ${error.message}`);
  } finally {
    $("add-send").disabled = false;
  }
});

function showSent(part) {
  $("sent").value = part;
  setText($("sent-text"), part < 1 ? `${Math.floor(part * 100)} % sent. You may lose the connection; it goes on from here.` : "Sent");
}

$("add").addEventListener("click", () => openAdd());
$("add-cancel").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => sending?.abort());

let dragged = 0;
addEventListener("dragenter", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  dragged += 1;
  $("drop").hidden = false;
});
addEventListener("dragleave", () => {
  dragged = Math.max(0, dragged - 1);
  $("drop").hidden = dragged === 0;
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files[0]) openAdd(event.dataTransfer.files[0]);
});

// -- from here on

async function begin() {
  try {
    const models = await get("/v1/models").catch((error) => {
      if (error.status === 401) throw error;
      return { data: [] };
    });
    const model = models.data[0];
    $("model").textContent = model ? `${model.id}${model.is_random ? " (random weights: its words mean nothing)" : ""}` : "the model is not ready yet";
    $("sign-out").hidden = !key.get();
    await refresh();
    trouble(null);
    await route();
  } catch (error) {
    trouble(error);
  }
}

async function poll() {
  if (!document.hidden && !$("key-dialog").open) {
    try {
      await refresh();
      await detail?.refresh();
      trouble(null);
    } catch (error) {
      trouble(error);
    }
  }
  setTimeout(poll, POLL_MS);
}

begin();
setTimeout(poll, POLL_MS);
