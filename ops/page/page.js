// The status page. It asks its own server once a second while it can be seen, and
// shows what comes from rows and logs as text only.

const $ = (id) => document.getElementById(id);
const every = 1000, everyParked = 5000; // ms
const keep = 600; // points: ten minutes
const shortest = 2 * 60 * 1000; // what a chart spans at least, in ms

// Writing numbers for people

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const count = (n) => (n > 0 && n < 10 ? tenth : whole).format(n);

function scaled(n, units, step) {
  let unit = 0;
  for (; n >= step && unit < units.length - 1; unit++) n /= step;
  return `${(n < 10 && unit > 0 ? tenth : whole).format(n)} ${units[unit]}`;
}

const size = (n) => scaled(n, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const rate = (n) => `${count(n)}/s`;

function span(seconds) {
  if (seconds < 0.01) return `${tenth.format(seconds * 1000)} ms`;
  if (seconds < 1) return `${whole.format(seconds * 1000)} ms`;
  if (seconds < 120) return `${(seconds < 10 ? tenth : whole).format(seconds)} s`;
  return seconds < 7200 ? `${whole.format(seconds / 60)} min` : `${tenth.format(seconds / 3600)} h`;
}

// Charts: an SVG each, drawn anew every second

const charts = [
  { id: "events", value: (p) => p.events, text: rate, least: 10 },
  { id: "lag", value: (p) => p.lag, text: span, least: 0.005 },
  { id: "behind", value: (p) => p.behind, text: size, least: 64 * 1024, binary: true },
];

function element(name, attributes, text) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  if (text !== undefined) e.textContent = text;
  return e;
}

// ceiling is a round number at or above n, of which half is round, too.
function ceiling(n, binary) {
  const base = binary ? 2 ** (10 * Math.floor(Math.log2(n) / 10)) : 10 ** Math.floor(Math.log10(n));
  const steps = binary ? [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] : [1, 2, 3, 4, 5, 6, 8, 10];
  return base * steps.find((step) => step * base >= n * 0.999);
}

function draw(chart, points, now) {
  const plot = $(chart.id).querySelector(".plot");
  const width = plot.clientWidth, height = plot.clientHeight;
  if (width === 0) return;
  const begin = now - Math.min(Math.max(now - (points[0]?.at ?? now), shortest), keep * every);
  const seen = points.filter((p) => p.at >= begin);
  const values = seen.map(chart.value).filter((v) => v !== null);
  const most = Math.max(...values, 0);
  const top = ceiling(Math.max(most, chart.least), chart.binary);
  const left = 62, bottom = height - 20;
  const x = (at) => left + ((at - begin) / (now - begin)) * (width - left);
  const y = (v) => bottom - (v / top) * (bottom - 8);

  const svg = element("svg", { "aria-hidden": "true", focusable: "false" });
  svg.append(...bands(seen, x, bottom), ...grid(chart, top, y, left, width));
  svg.append(...minutes(begin, now, x, height));
  svg.append(...curves(chart, seen, x, y, bottom));
  plot.replaceChildren(svg);
  describe(chart, seen, values, most, now - begin);
}

// bands are the times at which something was in the way.
function bands(seen, x, bottom) {
  const list = [];
  let from = null;
  seen.forEach((p, i) => {
    if (!p.well && from === null) from = p.at - every;
    const last = i === seen.length - 1;
    if (from !== null && (p.well || last)) {
      const to = p.well ? p.at - every : p.at;
      list.push(element("rect", { class: "unwell", x: x(from), y: 0, width: Math.max(x(to) - x(from), 1), height: bottom }));
      from = null;
    }
  });
  return list;
}

function grid(chart, top, y, left, width) {
  return [0, top / 2, top].flatMap((v) => [
    element("line", { class: "grid", x1: left, x2: width, y1: y(v), y2: y(v) }),
    element("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, v === 0 ? "0" : chart.text(v)),
  ]);
}

function minutes(begin, now, x, height) {
  const all = (now - begin) / 60000;
  const step = all <= 3 ? 1 : 2;
  const list = [element("text", { x: x(now), y: height - 3, "text-anchor": "end" }, "now")];
  for (let m = step; m < all - 0.2; m += step) {
    list.push(element("text", { x: x(now - m * 60000), y: height - 3, "text-anchor": "middle" }, `−${m} min`));
  }
  return list;
}

// curves leaves a gap where there is nothing to measure.
function curves(chart, seen, x, y, bottom) {
  const runs = [];
  let run = null;
  for (const p of seen) {
    const v = chart.value(p);
    if (v === null) run = null;
    else if (run && p.at - run[run.length - 1].at < 3 * every) run.push({ at: p.at, v });
    else runs.push((run = [{ at: p.at, v }]));
  }
  return runs.flatMap((points) => {
    if (points.length === 1) points = [{ at: points[0].at - every / 2, v: points[0].v }, points[0]];
    const path = "M" + points.map((p) => `${x(p.at).toFixed(1)},${y(p.v).toFixed(1)}`).join("L");
    const ends = `L${x(points[points.length - 1].at).toFixed(1)},${bottom}L${x(points[0].at).toFixed(1)},${bottom}Z`;
    return [element("path", { class: "area", d: path + ends }), element("path", { class: "curve", d: path })];
  });
}

// describe says in words what the curve shows.
function describe(chart, seen, values, most, width) {
  const figure = $(chart.id);
  const last = seen.length ? chart.value(seen[seen.length - 1]) : null;
  figure.querySelector(".now").textContent = last === null ? "–" : chart.text(last);
  figure.querySelector(".most").textContent = values.length ? `at most ${chart.text(most)} in ${span(Math.round(width / 1000))}` : "nothing to measure";
}

// The state in words

const said = {
  starting: "Starting", standby: "Standing by", backfilling: "Backfilling", streaming: "Streaming", stopping: "Stopping", halted: "Halted",
};

function sentence(s, last) {
  if (s.stalled) return "The pipeline is stalled.";
  if (s.trouble && s.state === "streaming") return "Streaming is held up.";
  if (s.state === "halted") return "The relay has halted.";
  if (s.state === "starting") return s.trouble ? "The relay waits to start." : "The relay is starting.";
  if (s.state === "standby") return "Standing by: another relay has the slot.";
  if (s.state === "stopping") return "The relay is stopping.";
  if (s.state === "backfilling") return `Backfilling at ${rate(last?.events ?? 0)}, ${count(s.backfill_left)} rows to go.`;
  if (!last || last.events === 0) return "All is published.";
  return `${count(last.events)} events a second, ${last.lag === null ? "from the table" : span(last.lag) + " from commit to ack"}.`;
}

function mood(s) {
  if (s.stalled || s.state === "halted") return "bad";
  if (s.state === "starting" || s.state === "standby" || s.state === "stopping") return "waiting";
  return s.trouble ? "trouble" : "well";
}

let announced = "";
function announce(text) {
  if (text === announced) return;
  announced = text;
  $("announce").textContent = text;
}

function showState(s, last) {
  document.body.dataset.state = mood(s);
  document.body.toggleAttribute("data-flow", Boolean(last && last.events > 0));
  $("badge").textContent = said[s.state] ?? s.state;
  $("state").textContent = sentence(s, last);
  $("trouble").textContent = s.trouble;
  $("trouble").hidden = !s.trouble;
  announce([said[s.state], s.trouble].filter(Boolean).join(": "));
  document.title = `${s.stalled ? "stalled" : s.state} · outbox-relay`;
}

function showPipeline(s) {
  $("version").textContent = s.version;
  $("table").textContent = s.table;
  $("stream").textContent = s.stream;
  $("slot-value").textContent = s.wal_end || "–";
  $("slot-note").textContent = `end of WAL; ${s.slot}`;
  $("decoder-value").textContent = s.received || "–";
  $("window-value").textContent = count(s.in_flight);
  $("window-note").textContent = `in flight, ${size(s.in_flight_bytes)}`;
  $("stream-value").textContent = count(s.published);
  $("recorder-value").textContent = count(s.unrecorded);
  $("recorder-fill").style.width = `${(100 * s.unrecorded) / s.recordable}%`;
  $("recorder-note").textContent = `to record, of ${count(s.recordable)}`;
  $("confirmed-value").textContent = s.confirmed || "–";
  $("confirmed-note").textContent = s.behind === null ? "not known" : `${size(s.behind)} behind`;
}

// Lists

const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });

function setTime(e, text) {
  e.dateTime = text;
  e.textContent = day.format(new Date(text));
}

function showLog(entries) {
  for (const entry of entries) {
    const row = $("log-row").content.cloneNode(true);
    const kind = row.querySelector(".kind");
    kind.textContent = entry.level === "warn" ? "warning" : entry.level;
    kind.className = `kind ${entry.level}`;
    setTime(row.querySelector("time"), entry.at);
    const [message, ...details] = entry.text.split("\n");
    row.querySelector(".reason").textContent = message;
    row.querySelector(".details").textContent = details.join("\n");
    $("log").prepend(row);
  }
  while ($("log").children.length > 30) $("log").lastElementChild.remove();
  $("log-note").hidden = $("log").children.length > 0;
}

const rows = new Map(); // id of a parked event to its element

function showParked(list, canRetry) {
  const ids = new Set(list.rows.map((row) => row.id));
  for (const [id, row] of rows) if (!ids.has(id)) removeParked(id, row);
  list.rows.forEach((row, place) => {
    const item = rows.get(row.id) ?? addParked(row);
    item.querySelector(".kind").textContent = `${row.aggregate_type} ${row.event_type}`;
    setTime(item.querySelector("time"), row.failed_at);
    item.querySelector(".attempts").textContent = row.failed_attempts > 1 ? `failed ${count(row.failed_attempts)} times` : "";
    item.querySelector(".reason").textContent = row.reason;
    item.querySelector("button").hidden = !canRetry;
    const there = $("parked").children[place];
    if (there !== item) $("parked").insertBefore(item, there ?? null);
  });
  $("retry-all").hidden = !canRetry || list.rows.length < 2;
  noteParked(list, canRetry);
}

function noteParked(list, canRetry) {
  const total = `${list.exact ? "" : "at least "}${count(list.failed)}`;
  const parts = [];
  if (list.failed === 0) parts.push("None.");
  else if (list.failed > list.rows.length) parts.push(`${total} in all; the newest ${count(list.rows.length)}:`);
  if (list.failed > 0 && !canRetry) parts.push("Read-only: set OUTBOX_HTTP_TOKEN to retry from here, or run outbox-relay retry ID.");
  $("parked-note").textContent = parts.join(" ");
  $("parked-note").hidden = parts.length === 0;
}

function addParked(row) {
  const item = $("parked-row").content.cloneNode(true).querySelector("li");
  item.querySelector(".id").textContent = row.id;
  const button = item.querySelector("button");
  button.setAttribute("aria-label", `Retry ${row.id}`);
  button.addEventListener("click", () => retry({ ids: [row.id] }, button));
  rows.set(row.id, item);
  return item;
}

// removeParked leaves the keyboard where it was: at the next row, or at the title.
function removeParked(id, row) {
  if (row.contains(document.activeElement)) {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    (next?.querySelector("button") ?? $("parked-title")).focus();
  }
  row.remove();
  rows.delete(id);
}

// Retrying

const tokenKey = "outbox-relay-token";
let asking = null; // what to retry once there is a token

async function retry(what, button) {
  const token = sessionStorage.getItem(tokenKey);
  if (!token) return askToken(what, button, "");
  button.disabled = true;
  try {
    const answer = await fetch("/api/retry", {
      method: "POST", cache: "no-store", credentials: "omit",
      headers: { "Authorization": `Bearer ${token}`, "Content-Type": "application/json" },
      body: JSON.stringify(what),
    });
    const body = await answer.json();
    if (answer.status === 401) {
      sessionStorage.removeItem(tokenKey);
      button.disabled = false;
      return askToken(what, button, body.error);
    }
    say(answer.ok ? `${count(body.retried)} pending again.` : body.error);
  } catch {
    say("The relay does not answer.");
  }
  button.disabled = false;
  // Its row may have gone meanwhile, and a disabled button has no focus to hand on.
  if (document.activeElement === document.body) (button.isConnected ? button : $("parked-title")).focus();
  await lookParked();
}

function say(text) { $("retried").textContent = text; }

function askToken(what, button, error) {
  asking = { what, button };
  $("ask-error").textContent = error;
  $("ask-error").hidden = !error;
  $("token").value = "";
  $("ask").showModal();
  $("token").focus();
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(tokenKey, $("token").value.trim());
  $("token").value = "";
  $("ask").close();
  retry(asking.what, asking.button);
});
$("ask-cancel").addEventListener("click", () => $("ask").close());
$("retry-all").addEventListener("click", () => retry({ all: true }, $("retry-all")));

// Looking

let points = [], logged = 0, canRetry = false, server = "";

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(10000) });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

async function look() {
  const s = await ask(`/api/status?history=${points.at(-1)?.at ?? 0}&log=${logged}`);
  if (s.started !== server) { // another process: what it has is asked for from the beginning
    const first = server === "";
    [server, points, logged] = [s.started, [], 0];
    $("log").replaceChildren();
    if (!first) return look();
  }
  points = [...points, ...s.history].slice(-keep);
  logged = s.log.at(-1)?.number ?? logged;
  canRetry = s.can_retry;
  const last = points.at(-1);
  showState(s, last);
  showPipeline(s);
  showLog(s.log);
  if (last) for (const chart of charts) draw(chart, points, last.at);
}

async function lookParked() {
  try {
    showParked(await ask("/api/parked"), canRetry);
  } catch (error) {
    $("parked-note").textContent = `Postgres can't be asked: ${error.message}`;
    $("parked-note").hidden = false;
  }
}

function lost() {
  document.body.dataset.state = "bad";
  document.body.removeAttribute("data-flow");
  $("badge").textContent = "no answer";
  $("state").textContent = "The relay does not answer.";
  $("trouble").textContent = "What is below is the last that it told.";
  $("trouble").hidden = false;
  announce("The relay does not answer.");
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const seen = () => document.hidden
  ? new Promise((done) => document.addEventListener("visibilitychange", done, { once: true })).then(seen)
  : Promise.resolve();

async function repeat(every, act) {
  for (;;) {
    await seen();
    await act();
    await pause(every);
  }
}

await look().catch(lost);
repeat(every, () => look().catch(lost));
repeat(everyParked, lookParked);
