// The page's whole program: one conversation with the server that sent it.

const MAX_FILE_BYTES = 32 * 2 ** 20;
// Where the system knows no type for an ending, files come without one.
const TYPES = {
  png: "image/png",
  jpg: "image/jpeg",
  jpeg: "image/jpeg",
  webp: "image/webp",
  gif: "image/gif",
  bmp: "image/bmp",
  tif: "image/tiff",
  tiff: "image/tiff",
};
const NEAR_END_PX = 80;
const LOST = "The connection was lost before the answer ended.";

const $ = (id) => document.getElementById(id);

// `turns`: the answered ones, {text, pictures, answer}. `pictures`: those to send, {name, address, data}, `address` a
// blob: URL and `data` a promise of a data: URL. `asking`: {turn, controller} of what is being asked, else null.
let turns = [];
let pictures = [];
let asking = null;
let model = null;
let following = true;
const sizes = new ResizeObserver(() => {
  if (following) $("log").scrollTop = $("log").scrollHeight;
});

// --- the server ---

class ServerError extends Error {}

// Relative to the page, without the name and password that its own address may hold: fetch() takes none.
function addressOf(path) {
  const address = new URL(path, location.href);
  address.username = address.password = "";
  return address.href;
}

// Says it in our words, unless the person has stopped it.
function failing(words) {
  return (error) => {
    throw error.name === "AbortError" ? error : new ServerError(words);
  };
}

async function call(path, options) {
  const response = await fetch(addressOf(path), options).catch(failing("The server cannot be reached."));
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const error = await response.json().then((body) => body.error, () => null);
  const said = (error && error.message) || response.statusText || "no reason given";
  return new ServerError(`${response.status}: ${said}`);
}

async function loadModel() {
  const card = (await (await call("v1/models")).json()).data[0];
  model = card.id;
  $("model").textContent = document.title = model;
  $("limits").textContent = card.max_model_len ? `up to ${count(card.max_model_len)} tokens` : "";
  const most = $("max_tokens");
  if (card.max_model_len) most.max = card.max_model_len;
  if (most.validity.rangeOverflow) most.value = most.max;
}

// Server-sent events: [data, when they came]. Chunks end anywhere, inside a character or between \r and \n too.
async function* eventsOf(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read().catch(failing(LOST));
    if (done) return;
    const now = performance.now();
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line !== "" || data.length === 0) continue;
      yield [data.join("\n"), now];
      data = [];
    }
  }
}

// Tells `answer` what comes: its text, when tokens came, why it ended, its usage.
async function readAnswer(stream, answer) {
  let ended = false;
  for await (const [data, now] of eventsOf(stream)) {
    if (data === "[DONE]") {
      ended = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message);
    if (chunk.usage) answer.usage = chunk.usage;
    const choice = chunk.choices[0];
    // The chunk that names the role comes before any token.
    if (!choice || (choice.delta.role && !choice.delta.content)) continue;
    answer.lastAt = now;
    if (answer.firstAt === null) answer.firstAt = now;
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    answer.grow(choice.delta.content || "");
  }
  if (!ended) throw new ServerError(LOST);
}

// --- the conversation ---

function messageOf(text, urls) {
  if (urls.length === 0) return { role: "user", content: text };
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: text ? [...parts, { type: "text", text }] : parts };
}

async function bodyOf(turn) {
  const messages = [];
  for (const one of [...turns, turn]) {
    messages.push(messageOf(one.text, await Promise.all(one.pictures.map((picture) => picture.data))));
    if (one !== turn) messages.push({ role: "assistant", content: one.answer });
  }
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "seed"]) {
    if ($(name).value !== "") body[name] = $(name).valueAsNumber;
  }
  return JSON.stringify(body);
}

async function ask() {
  const turn = { text: $("question").value.trim(), pictures, answer: "" };
  if (asking || (!turn.text && turn.pictures.length === 0)) return;
  const view = showTurn(turn);
  const mine = (asking = { turn, controller: new AbortController() });
  setPictures([]);
  notice("");
  $("question").value = "";
  showAsking();
  const answer = { askedAt: performance.now(), firstAt: null, lastAt: null, endedAt: null, usage: null, finish: null };
  answer.grow = (text) => {
    turn.answer += text;
    view.grow(text, statsOf(answer));
  };
  const problem = await send(turn, answer, mine.controller).then(() => null, (error) => error);
  // Else a new conversation has begun.
  if (asking === mine) finish(turn, view, answer, problem);
}

async function send(turn, answer, controller) {
  try {
    if (model === null) await loadModel();
    const headers = { "Content-Type": "application/json" };
    const body = await bodyOf(turn);
    const options = { method: "POST", headers, body, signal: controller.signal };
    const response = await call("v1/chat/completions", options);
    await readAnswer(response.body, answer);
  } finally {
    controller.abort(); // so that nothing goes on behind an answer that could not be read
    answer.endedAt = performance.now();
  }
}

function finish(turn, view, answer, problem) {
  const stopped = problem !== null && problem.name === "AbortError";
  // A stopped answer is as good as one that ended there, if there is any of it.
  const kept = problem === null || (stopped && turn.answer !== "");
  if (kept) turns.push(turn);
  else putBack(turn);
  let note = "";
  if (stopped) note = "Stopped.";
  else if (problem instanceof ServerError) note = problem.message;
  else if (problem) note = `The answer cannot be read: ${problem.message}`;
  else if (answer.finish === "length") note = "Cut off: these were the most tokens allowed.";
  view.end(statsOf(answer), { kept, failed: problem !== null && !stopped, note });
  asking = null;
  showAsking();
}

// The question of a failed turn, before whatever has been written since.
function putBack(turn) {
  const box = $("question");
  box.value = [turn.text, box.value].filter((text) => text !== "").join("\n");
  setPictures([...turn.pictures, ...pictures]);
}

function startAnew() {
  const gone = asking ? [...turns, asking.turn] : turns;
  if (asking) asking.controller.abort();
  asking = null;
  turns = [];
  for (const picture of gone.flatMap((turn) => turn.pictures)) URL.revokeObjectURL(picture.address);
  for (const view of document.querySelectorAll(".turn")) view.remove();
  $("welcome").hidden = false;
  notice("");
  showAsking();
  $("question").focus();
}

// --- what is seen of it ---

const count = (number) => number.toLocaleString("en");
const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;

// [key, label, value] of what is known by now. The speed is that of the tokens after the first.
function statsOf({ askedAt, firstAt, lastAt, endedAt, usage }) {
  const stats = [];
  if (firstAt !== null) stats.push(["first", "First token", `${count(Math.round(firstAt - askedAt))} ms`]);
  if (usage) {
    const details = usage.prompt_tokens_details || {};
    const rate = (1000 * (usage.completion_tokens - 1)) / (lastAt - firstAt);
    stats.push(["tokens", "Tokens", count(usage.completion_tokens)]);
    stats.push(["speed", "Speed", rate > 0 && rate < Infinity ? `${rate.toFixed(1)} tokens/s` : "–"]);
    stats.push(["prompt", "Prompt tokens", count(usage.prompt_tokens)]);
    stats.push(["cached", "of them cached", count(details.cached_tokens || 0)]);
  }
  if (endedAt) stats.push(["total", "Total", seconds(endedAt - askedAt)]);
  return stats;
}

function showTurn(turn) {
  for (const dropped of document.querySelectorAll(".turn.dropped")) dropped.remove();
  const view = $("log").appendChild($("turn").content.firstElementChild.cloneNode(true));
  const part = (name) => view.querySelector(`.${name}`);
  const text = part("answer").appendChild(document.createTextNode(""));
  part("asked").textContent = turn.text;
  part("shots").append(...turn.pictures.map(imageOf));
  $("welcome").hidden = true;
  follow(view);
  return {
    grow(more, stats) {
      text.appendData(more);
      showStats(part("stats"), stats);
    },
    end(stats, { kept, failed, note }) {
      part("reply").setAttribute("aria-busy", "false");
      part("note").textContent = note;
      view.classList.toggle("dropped", !kept);
      view.classList.toggle("failed", failed);
      showStats(part("stats"), stats);
    },
  };
}

// Keeps the end of the conversation in sight while `view` grows, until the person scrolls up to read.
function follow(view) {
  following = true;
  sizes.observe(view);
}

function listenForScrolling() {
  const log = $("log");
  let lastTop = 0;
  log.addEventListener("scroll", () => {
    const isNearEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
    following = isNearEnd || (following && log.scrollTop >= lastTop);
    lastTop = log.scrollTop;
  });
  sizes.observe(log);
}

function showStats(list, stats) {
  for (const [key, label, value] of stats) {
    let shown = list.querySelector(`[data-stat=${key}]`);
    if (!shown) {
      const group = list.appendChild(document.createElement("div"));
      group.appendChild(document.createElement("dt")).textContent = label;
      shown = group.appendChild(document.createElement("dd"));
      shown.dataset.stat = key;
    }
    if (shown.textContent !== value) shown.textContent = value;
  }
}

function showAsking() {
  const { activeElement } = document;
  $("send").hidden = asking !== null;
  $("stop").hidden = asking === null;
  if (activeElement === $("send") && asking) $("stop").focus();
  if (activeElement === $("stop") && !asking) $("question").focus();
}

function notice(words) {
  $("notice").textContent = words;
}

// --- pictures ---

function imageOf(picture) {
  const image = document.createElement("img");
  image.alt = picture.name; // also what is seen of a kind that browsers do not show
  image.title = picture.name;
  image.src = picture.address;
  return image;
}

function setPictures(some) {
  pictures = some;
  const list = $("pictures");
  list.textContent = "";
  list.hidden = some.length === 0;
  for (const picture of some) {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.addEventListener("click", () => removePicture(picture));
    const item = list.appendChild(document.createElement("li"));
    item.append(imageOf(picture), remove);
  }
}

function removePicture(picture) {
  const index = pictures.indexOf(picture);
  URL.revokeObjectURL(picture.address);
  setPictures(pictures.filter((one) => one !== picture));
  const buttons = $("pictures").querySelectorAll("button");
  (buttons[Math.min(index, buttons.length - 1)] || $("question")).focus();
}

function typeOf(file) {
  const isKnown = Object.values(TYPES).includes(file.type);
  return isKnown ? file.type : TYPES[file.name.split(".").pop().toLowerCase()];
}

function refusalOf(file) {
  if (!typeOf(file)) return "is not a PNG, JPEG, WebP, GIF, BMP or TIFF picture";
  if (file.size === 0) return "is empty";
  if (file.size > MAX_FILE_BYTES) return `is larger than ${MAX_FILE_BYTES / 2 ** 20} MiB`;
  return null;
}

function addFiles(files) {
  const refused = [];
  const added = [];
  for (const file of files) {
    const reason = refusalOf(file);
    if (reason) refused.push(`${file.name} ${reason}.`);
    else added.push({ name: file.name, address: URL.createObjectURL(file), data: dataUrlOf(file) });
  }
  notice(refused.join(" "));
  setPictures([...pictures, ...added]);
  for (const picture of added) {
    picture.data.catch(() => {
      if (pictures.includes(picture)) removePicture(picture);
      notice(`${picture.name} cannot be read.`);
    });
  }
}

function dataUrlOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(`data:${typeOf(file)};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    reader.onerror = () => reject(new ServerError(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

// --- what a person does ---

function listenForFiles() {
  const holdsFiles = (event) => event.dataTransfer !== null && event.dataTransfer.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    if (!holdsFiles(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (files.length === 0) return;
    event.preventDefault();
    addFiles(files);
  });
  $("files").addEventListener("change", () => {
    addFiles($("files").files);
    $("files").value = ""; // the same file may be picked again
  });
}

function listen() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => asking && asking.controller.abort());
  $("new").addEventListener("click", startAnew);
  listenForFiles();
  listenForScrolling();
}

listen();
loadModel().catch((error) => {
  $("limits").textContent = error instanceof ServerError ? error.message : "This is not the server of a model.";
});
