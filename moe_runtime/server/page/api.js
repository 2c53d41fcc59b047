// Requests to the server that this page came from, with the API key that this tab keeps.

const KEY = "moe_runtime.api_key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0 where the server cannot be reached
  }
}

// The response; throws ApiError with the server's own words where it refuses.
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.authorization = `Bearer ${apiKey.get()}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server cannot be reached");
  }
  if (response.ok) return response;
  const text = await response.text();
  throw new ApiError(response.status, messageIn(text) ?? `the server answered ${response.status}`);
}

function messageIn(text) {
  try {
    return JSON.parse(text).error?.message;
  } catch {
    return undefined;
  }
}

// The objects of a stream of server-sent events, up to [DONE]; throws ApiError for an error among them.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "the connection ended before the answer did");
      buffered += value.replaceAll("\r", "");
      const pieces = buffered.split("\n\n");
      buffered = pieces.pop();
      for (const piece of pieces) {
        const data = dataOf(piece);
        if (data === "[DONE]") return;
        if (!data) continue;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new ApiError(parsed.error.code, parsed.error.message);
        yield parsed;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, "the connection broke before the answer was complete");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(piece) {
  const lines = piece.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}
