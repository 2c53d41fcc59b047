// The chat: several turns, each answer streamed, which can be stopped.

import { call, events } from "./api.js";

const $ = (id) => document.getElementById(id);

export function startChat({ model, onRefused }) {
  let turns = [];
  let running = null; // AbortController of the answer that streams

  async function send() {
    const content = $("prompt").value.trim();
    if (!content || running) return;
    $("prompt").value = "";
    turns.push({ role: "user", content });
    addMessage("user").text.textContent = content;
    const mine = turns;
    const abort = new AbortController();
    setRunning(abort);
    const view = addMessage("assistant");
    try {
      const answer = await stream(request(model(), mine), view, abort.signal);
      mine.push({ role: "assistant", content: answer });
    } catch (error) {
      mine.pop(); // a question without an answer is not sent again
      if (!$("prompt").value && turns === mine) $("prompt").value = content;
      showError(view, error);
      onRefused(error);
    } finally {
      view.element.classList.remove("busy");
      if (running === abort) setRunning(null);
    }
  }

  function setRunning(abort) {
    running = abort;
    $("send").disabled = abort !== null;
    $("stop").disabled = abort === null;
    $("messages").setAttribute("aria-busy", String(abort !== null));
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", () => {
    running?.abort();
    turns = [];
    $("messages").replaceChildren();
    $("prompt").focus();
  });
}

function request(model, messages) {
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  const maxTokens = $("max-tokens").valueAsNumber;
  const temperature = $("temperature").valueAsNumber;
  if (Number.isFinite(maxTokens)) body.max_tokens = maxTokens;
  if (Number.isFinite(temperature)) body.temperature = temperature;
  return body;
}

// Show the answer as it comes; its text. An answer that was stopped is what had come by then.
async function stream(body, view, signal) {
  const began = performance.now();
  let text = "";
  let firstAt = null;
  let usage = null;
  let reason = "";
  try {
    for await (const chunk of events(await call("v1/chat/completions", { body, signal }))) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      const delta = choice?.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning;
      if (thought || delta.content) firstAt ??= performance.now();
      reason = choice?.finish_reason ?? reason;
      following(() => {
        if (thought) view.reasoning.append(thought);
        if (delta.content) view.text.append(delta.content);
      });
      text += delta.content ?? "";
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    reason = "stopped";
  }
  following(() => (view.footer.textContent = summary({ began, firstAt, usage, reason })));
  return text;
}

function summary({ began, firstAt, usage, reason }) {
  const parts = [];
  if (usage) {
    const seconds = (performance.now() - firstAt) / 1000;
    parts.push(`${usage.completion_tokens} tokens`);
    if (usage.completion_tokens > 1) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (firstAt !== null) parts.push(`first after ${((firstAt - began) / 1000).toFixed(2)} s`);
  if (reason === "stopped") parts.push("stopped");
  if (reason === "length") parts.push("cut at the limit of tokens");
  return parts.join(" · ");
}

function addMessage(role) {
  const element = document.createElement("article");
  element.className = `message ${role}`;
  element.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const [reasoning, text, footer] = ["div", "div", "footer"].map((name) => document.createElement(name));
  reasoning.className = "reasoning";
  text.className = "text";
  element.append(reasoning, text, footer);
  if (role === "assistant") element.classList.add("busy");
  $("messages").querySelector(".hint")?.remove();
  $("messages").append(element);
  $("messages").scrollTop = $("messages").scrollHeight;
  return { element, reasoning, text, footer };
}

function showError(view, error) {
  following(() => {
    const alert = document.createElement("p");
    alert.setAttribute("role", "alert");
    alert.textContent = error.message;
    view.element.append(alert);
  });
}

// Change the conversation; who reads its end goes on reading its end, who has scrolled up stays there.
function following(change) {
  const box = $("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}
