// Puts the page together: the state line, the key, the models, the chat, the load.

import { apiKey, call } from "./api.js";
import { startChat } from "./chat.js";
import { startLoad } from "./load.js";

const $ = (id) => document.getElementById(id);

function setState(kind, text) {
  if ($("state").textContent === text) return; // not to be read out again
  $("state").dataset.kind = kind;
  $("state").textContent = text;
}

function onRefused(error) {
  if (error.status === 401) {
    setState("bad", apiKey.get() ? "the API key is wrong" : "an API key is needed");
    $("key-form").dataset.wanted = "";
  } else if (error.status === 503) {
    setState("waiting", error.message);
  } else if (error.status === 0) {
    setState("bad", error.message);
  }
}

function onAnswer(load) {
  delete $("key-form").dataset.wanted;
  if (load.ranks_answer) setState("good", `serving on ${load.ranks.length} rank${load.ranks.length === 1 ? "" : "s"}`);
  else setState("bad", "a rank does not answer; the numbers are old");
  if (!$("model").options.length) fillModels();
}

let filling = false;

async function fillModels() {
  if (filling) return;
  filling = true;
  try {
    const { data } = await (await call("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  } catch (error) {
    onRefused(error);
  } finally {
    filling = false;
  }
}

$("key").value = apiKey.get();
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set($("key").value.trim());
  fillModels();
});
startChat({ model: () => $("model").value || undefined, onRefused });
startLoad({ onAnswer, onRefused });
