// Resumable uploads (tus 1.0.0). What a broken connection or a closed tab left is gone on with: the address of an
// unfinished upload is remembered in this tab by the file's name, size and date.

import { ApiError, request, sleep } from "./api.js";

const PIECE_BYTES = 8 << 20;
const TUS = { "Tus-Resumable": "1.0.0" };
const PATIENCE = 12;

export async function upload(file, onProgress, signal) {
  const mark = `nvila-upload ${file.name} ${file.size} ${file.lastModified}`;
  let state = await resume(sessionStorage.getItem(mark), signal);
  if (!state) {
    state = await create(file, signal);
    sessionStorage.setItem(mark, state.url);
  }
  let failures = 0;
  while (!state.fileId) {
    onProgress(state.offset / file.size);
    try {
      state = await send(file, state, signal);
      failures = 0;
    } catch (error) {
      const isFinal = error.name === "AbortError" || (error.status >= 400 && ![409, 429].includes(error.status) && error.status < 500);
      if (isFinal || ++failures > PATIENCE) throw error;
      await sleep(Math.min(500 * 2 ** failures, 15000), signal);
      state = (await resume(state.url, signal).catch(() => null)) ?? state;
    }
  }
  onProgress(1);
  sessionStorage.removeItem(mark);
  return state.fileId;
}

async function create(file, signal) {
  const headers = { ...TUS, "Upload-Length": String(file.size), "Upload-Metadata": `filename ${base64(file.name)}` };
  const response = await request("/v1/uploads", { method: "POST", headers, signal });
  return { url: response.headers.get("Location"), offset: 0, fileId: null };
}

async function resume(url, signal) {
  if (!url) return null;
  try {
    return look(url, await request(url, { method: "HEAD", headers: TUS, signal }));
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}

async function send(file, { url, offset }, signal) {
  const headers = { ...TUS, "Upload-Offset": String(offset), "Content-Type": "application/offset+octet-stream" };
  const body = file.slice(offset, offset + PIECE_BYTES);
  return look(url, await request(url, { method: "PATCH", headers, body, signal }));
}

const look = (url, response) => ({
  url,
  offset: Number(response.headers.get("Upload-Offset")),
  fileId: response.headers.get("Nvila-File-Id"),
});

const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
