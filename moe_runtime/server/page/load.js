// The server's load, asked for once a second while the page is looked at: numbers, sparklines, heat map, ranks.

import { call } from "./api.js";
import { HeatMap } from "./heatmap.js";
import { Sparkline } from "./spark.js";

const INTERVAL_MS = 1000;
const $ = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const percent = (share) => `${(100 * share).toFixed(share === 0 || share >= 0.1 ? 0 : share < 0.01 ? 2 : 1)} %`;

export function startLoad({ onAnswer, onRefused }) {
  const sparks = {
    out: new Sparkline($("spark-out"), 10),
    in: new Sparkline($("spark-in"), 10),
    running: new Sparkline($("spark-running"), 4),
    waiting: new Sparkline($("spark-waiting"), 4),
    kv: new Sparkline($("spark-kv"), 0.05),
  };
  const map = new HeatMap($("map"), $("readout"));

  function show(load) {
    showNumbers(load, sparks);
    map.show(load);
    const total = sum(load.tokens.map(sum));
    $("map").dataset.tokens = total;
    $("window").textContent = windowOf(load, total);
    showRanks(load.ranks);
    $("balance").textContent = balanceOf(load);
  }

  async function poll() {
    if (document.hidden) {
      Object.values(sparks).forEach((spark) => spark.clear()); // their points are a second apart
    } else {
      try {
        const load = await (await call("v1/load")).json();
        show(load);
        onAnswer(load);
      } catch (error) {
        onRefused(error);
      }
    }
    setTimeout(poll, INTERVAL_MS);
  }

  function redraw() {
    Object.values(sparks).forEach((spark) => spark.draw());
    map.restyle();
    map.drawScale($("scale"));
  }
  window.addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
  poll();
}

// A window has no length until the ranks were asked twice, and begins anew where nobody asked for half a minute.
function windowOf({ window_seconds: seconds }, total) {
  if (!seconds) return "measuring";
  return `last ${Math.round(seconds)} s${total ? "" : ": no tokens"}`;
}

function showNumbers(load, sparks) {
  const now = load.series.at(-1);
  const ranks = load.ranks;
  const values = {
    out: now?.generation_tokens_per_second,
    in: now?.prompt_tokens_per_second,
    running: sum(ranks.map((rank) => rank.running)),
    waiting: sum(ranks.map((rank) => rank.waiting)),
    kv: Math.max(0, ...ranks.map((rank) => rank.kv_cache_usage)),
  };
  const rate = (value) => value === undefined ? "–" : value.toLocaleString(undefined, { maximumFractionDigits: value < 10 ? 1 : 0 });
  $("rate-out").textContent = rate(values.out);
  $("rate-in").textContent = rate(values.in);
  $("running").textContent = values.running;
  $("waiting").textContent = values.waiting;
  $("kv").textContent = percent(values.kv);
  for (const [name, spark] of Object.entries(sparks)) {
    if (values[name] !== undefined) spark.push(values[name]);
  }
}

function showRanks(ranks) {
  const body = $("ranks");
  while (body.rows.length > ranks.length) body.deleteRow(-1);
  while (body.rows.length < ranks.length) body.append(makeRow());
  ranks.forEach((rank, i) => {
    const [name, share, running, waiting, kv] = body.rows[i].cells;
    name.textContent = rank.rank;
    share.firstChild.value = rank.share;
    share.lastChild.textContent = percent(rank.share);
    running.textContent = rank.running;
    waiting.textContent = rank.waiting;
    kv.textContent = percent(rank.kv_cache_usage);
  });
}

function makeRow() {
  const row = document.createElement("tr");
  const name = document.createElement("th");
  name.scope = "row";
  row.append(name, ...[1, 2, 3, 4].map(() => document.createElement("td")));
  const meter = document.createElement("meter");
  meter.setAttribute("aria-label", "share");
  row.cells[1].append(meter, document.createElement("span"));
  return row;
}

function balanceOf({ balancedness, window_seconds: seconds }) {
  const overall = balancedness.overall;
  if (typeof overall !== "number" || !Number.isFinite(overall)) return "";
  return `Balance of the ranks over the last ${Math.round(seconds)} s: ${overall.toFixed(2)} (mean load / highest; 1 is even)`;
}
