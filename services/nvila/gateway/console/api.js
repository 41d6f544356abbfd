// The gateway's HTTP API, as any client would use it: JSON, server-sent events, resumable uploads.

const KEY = "nvila-api-key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = "unavailable", param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export async function request(path, { method = "GET", json, headers = {}, body, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  if (json !== undefined) {
    sent["Content-Type"] = "application/json";
    body = JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(path, { method, headers: sent, body, signal, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway does not answer.");
  }
  if (!response.ok) throw await toError(response);
  return response;
}

export const get = async (path, options) => (await request(path, options)).json();
export const post = async (path, json, options) => (await request(path, { method: "POST", json, ...options })).json();

async function toError(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { status: response.status, code: error.code, param: error.param });
  } catch {
    return new ApiError(`The gateway answered with status ${response.status}.`, { status: response.status });
  }
}

// Events of a text/event-stream: {id, event, data}. Comments keep the line alive and are dropped.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        const found = { id: null, event: "message", data: "" };
        for (const line of rest.slice(0, end).split("\n")) {
          const at = line.indexOf(":");
          if (at > 0) found[line.slice(0, at)] = line.slice(at + 1).trimStart();
        }
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What a job says, across any number of broken connections, until it is over.
export async function* follow(jobId, signal) {
  let last = "0";
  let pause = 500;
  for (;;) {
    try {
      const response = await request(`/v1/jobs/${jobId}/events?after=${last}`, { signal });
      if (response.status === 204) return;
      for await (const event of events(response)) {
        if (event.event === "error") break;
        last = event.id ?? last;
        pause = 500;
        yield { kind: event.event, data: JSON.parse(event.data) };
      }
    } catch (error) {
      if (error.name === "AbortError" || (error.status >= 400 && error.status < 500 && error.status !== 429)) throw error;
    }
    await sleep(pause, signal);
    pause = Math.min(pause * 2, 8000);
  }
}

export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(new DOMException("", "AbortError"))), { once: true });
  });
}
