// The page of `ttt serve`: a chat on the left, and what was learnt from it on the right.
//
// Whatever the server or the model sends is put in as text (`textContent`), never as HTML.

const POLL_SECONDS = [0.5, 0.5, 1, 1, 2, 2, 4, 4, 8, 8, 15, 15]; // how long learning may take: a minute
const FIRST_VERSIONS = 5;
const TEMPERATURE = 0.3;
const LONGEST_ANSWER = 512; // tokens: a small model may not find an end of its own

const at = (id) => document.getElementById(id);
const state = {
  key: sessionStorage.getItem("ttt-key") ?? "",
  named: sessionStorage.getItem("ttt-user") ?? "", // the user that an operator chose
  user: null, // whom the server takes us for
  model: "",
  conversation: [],
  answering: null, // the AbortController of the answer that is being written
  allVersions: false,
  known: null, // what /v1/users/{id} said last
  session: 0, // counts changes of the user: answers that were asked for before one are dropped
};

// -- the server -----------------------------------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, message, code = null, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (state.key) all.authorization = `Bearer ${state.key}`;
  if (state.named) all["x-ttt-user"] = state.named;
  if (body !== undefined) all["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers: all, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `status ${response.status}`;
  throw new ApiError(response.status, message, error?.code, response.headers.get("retry-after"));
}

const json = async (...request) => (await call(...request)).json();
const userPath = (rest = "") => `/v1/users/${encodeURIComponent(state.user)}${rest}`;

/** What happened, in plain words. */
function explain(error) {
  if (!(error instanceof ApiError)) return `This page failed: ${error.message}`;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const said = ` (${error.message})`;
  if (error.status === 0) return "The server does not answer. Is it still running?";
  if (error.status === 401) return `The server does not accept this key${said}. Enter it at "You".`;
  if (error.status === 403) return `This is not allowed with your key${said}.`;
  if (error.code === "context_length_exceeded") return `This conversation is too long for the model${said}. Start a new one.`;
  if (error.status === 429) {
    const why = error.message.replace(/; try again in .*$/, ""); // said once is enough
    return `That is more than the server takes now: ${why}.${wait || " Try again soon."}`;
  }
  if (error.status >= 500) return `The server could not do this${said}.${wait}`;
  return `This did not work: ${error.message}.${wait}`;
}

/** The `data:` lines of a response, as they arrive. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop(); // the beginning of an event whose end is still to come
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

// -- small parts of the page ----------------------------------------------------------------------------------------

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function showError(id, error) {
  at(id).hidden = error === null;
  at(id).textContent = error === null ? "" : explain(error);
  if (error?.status === 401) askForKey();
}

/** Do `work`; what goes wrong is shown at `errorId`, and `button` cannot be pressed meanwhile. */
async function act(errorId, button, work) {
  showError(errorId, null);
  if (button) button.disabled = true;
  try {
    return await work();
  } catch (error) {
    showError(errorId, error);
  } finally {
    if (button?.isConnected) button.disabled = false;
  }
}

function confirmed(title, text, yes) {
  const dialog = at("confirm");
  at("confirm-title").textContent = title;
  at("confirm-text").textContent = text;
  at("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

const plural = (count, one, many) => `${count} ${count === 1 ? one : many}`;
const date = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
const size = (bytes) => (bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0 %";
  if (value < 0.01) return "< 0.01 %";
  return `${value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0)} %`;
}

// -- who you are ----------------------------------------------------------------------------------------------------

async function refreshStatus() {
  const { session } = state;
  const found = await json("/v1/status");
  if (session !== state.session) return;
  state.user = found.user;
  state.model = found.model;
  at("model").textContent = found.model;
  at("online").textContent = `${plural(found.online, "user", "users")} online`;
  showWho(found.users);
}

function showWho(users) {
  const operator = users !== undefined; // only operators are told names
  at("key-form").hidden = true;
  at("drop-key").hidden = !state.key;
  at("user-form").hidden = !operator;
  at("who").textContent = state.user === null
    ? "You have an operator's key. Choose a user to act for; until then nothing is learnt."
    : `The model learns from your words for the user “${state.user}” alone.`;
  if (!operator) return;
  if (document.activeElement !== at("user")) at("user").value = state.user ?? "";
  const others = users.filter((name) => name !== state.user);
  at("others").textContent = others.length ? `Also online: ${others.join(", ")}` : "Nobody else is online.";
}

function askForKey() {
  state.user = null;
  at("key-form").hidden = false;
  at("user-form").hidden = true;
  at("drop-key").hidden = true;
  at("who").textContent = "Enter your key, and what was learnt from you appears here.";
  at("online").textContent = "";
  showUser(null);
  showTaught([]);
}

/** Begin as somebody else, or for the first time. */
async function begin() {
  state.session += 1;
  state.known = null;
  state.allVersions = false;
  newConversation();
  for (const id of ["learnt-error", "versions-error", "data-error"]) showError(id, null);
  for (const id of ["learning", "data-note"]) at(id).textContent = "";
  await act("you-error", null, async () => {
    try {
      await refreshStatus();
    } catch (error) {
      // Without a key there is nothing wrong yet: the form says what is needed.
      if (error.status === 401 && !state.key) return askForKey();
      throw error;
    }
    await refreshPanel();
  });
}

function useKey(event) {
  event.preventDefault();
  state.key = at("key").value.trim();
  sessionStorage.setItem("ttt-key", state.key);
  at("key").value = "";
  begin();
}

function dropKey() {
  sessionStorage.removeItem("ttt-key");
  sessionStorage.removeItem("ttt-user");
  state.key = state.named = "";
  begin();
  at("key").focus();
}

function useUser(event) {
  event.preventDefault();
  state.named = at("user").value.trim();
  sessionStorage.setItem("ttt-user", state.named);
  begin();
}

// -- what was learnt ------------------------------------------------------------------------------------------------

/** What is known of the user; null of one who has not said anything yet. */
async function fetchUser() {
  if (state.user === null) return null;
  try {
    return await json(userPath());
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

async function refreshPanel() {
  const { session } = state;
  const user = await fetchUser();
  if (session !== state.session) return;
  showUser(user);
  const taught = user?.keeps === "weights" ? (await json(userPath("/taught"))).data : []; // a state keeps no texts
  if (session !== state.session) return;
  showTaught(taught);
  if (user && !user.online) { // asking for the texts has brought the user's weights in: now their numbers are known
    const now = await fetchUser();
    if (session === state.session) showUser(now);
  }
}

function showUser(user) {
  state.known = user;
  at("numbers").hidden = !user?.online;
  for (const id of ["study", "export"]) at(id).disabled = user?.keeps !== "weights";
  at("forget").disabled = !user;
  if (user?.online) {
    at("updates").textContent = user.updates;
    at("tokens").textContent = user.tokens;
    at("drift").textContent = user.drift === null ? "–" : percent(user.drift);
  }
  if (user?.read_only) at("learning").textContent = `Nothing more is learnt now: ${user.read_only}`;
  showVersions(user?.versions ?? []);
}

function showVersions(versions) {
  const shown = state.allVersions ? versions : versions.slice(0, FIRST_VERSIONS);
  at("versions-empty").hidden = versions.length > 0;
  at("versions").replaceChildren(...shown.map((version, index) => versionItem(version, index === 0)));
  at("more").hidden = versions.length <= FIRST_VERSIONS || state.allVersions;
  at("more").textContent = `Show all ${versions.length}`;
}

function versionItem(version, current) {
  const item = make("li");
  const restores = version.restores ? `, the same as version ${version.restores}` : "";
  item.append(make("b", "", `Version ${version.number}`), make("small", "", `${date(version.created)}, ${size(version.bytes)}${restores}`));
  if (current) {
    item.append(make("span", "current", "in use"));
    return item;
  }
  const button = make("button", "", "Roll back");
  button.type = "button";
  button.setAttribute("aria-label", `Roll back to version ${version.number}`);
  button.addEventListener("click", () => rollBack(version.number, button));
  item.append(button);
  return item;
}

function showTaught(taught) {
  at("taught-empty").hidden = taught.length > 0 || state.known?.keeps === "state";
  at("taught-note").hidden = taught.length === 0;
  at("taught").replaceChildren(...[...taught].reverse().map(taughtItem)); // the newest first
}

function taughtItem({ text, before, now, studied }) {
  const item = make("li");
  const said = make("p", "said", text.trim());
  said.title = text.trim();
  item.append(said);
  if (studied) item.append(make("span", "studied", "studied"));
  item.append(measure("before", before), measure("now", now));
  return item;
}

/** A bar for a loss, in nats per token, as the probability that it stands for. */
function measure(name, loss) {
  const share = Math.exp(-loss);
  const line = make("div", `measure ${name}`);
  const track = make("div", "track");
  track.setAttribute("aria-hidden", "true");
  track.append(make("div", "fill"));
  track.firstChild.style.width = `${100 * share}%`;
  line.append(make("span", "", name), track, make("span", "", percent(share)));
  return line;
}

/** Look until the user's updates have risen above `updates`. */
async function waitForLearning(updates) {
  const { session } = state;
  at("learning").textContent = "Learning from what you said.";
  for (const seconds of POLL_SECONDS) {
    await sleep(seconds);
    if (session !== state.session) return;
    const user = await fetchUser();
    if (session !== state.session) return;
    if ((user?.updates ?? 0) > updates) {
      const version = state.known?.versions[0]?.number;
      await finishLearning(user, version);
      return;
    }
  }
  at("learning").textContent = "Learning takes longer than usual. It goes on; load this page again to see it.";
}

async function finishLearning(user, version) {
  const { session } = state;
  // What is learnt is used at once; the store keeps it as a version a little later.
  if (user.versions[0]?.number === version) await sleep(1);
  await Promise.all([refreshPanel(), refreshStatus()]);
  if (session === state.session && !state.known?.read_only) at("learning").textContent = "Learnt.";
}

async function rollBack(number, button) {
  const text = "What was learnt after it is no longer used. It stays in the list, so you can come back to it.";
  if (!(await confirmed(`Go back to version ${number}?`, text, "Roll back"))) return;
  await act("versions-error", button, async () => {
    await call(userPath("/rollback"), { method: "POST", body: { version: number } });
    at("learning").textContent = `Back at version ${number}.`;
    await refreshPanel();
  });
}

async function study() {
  await act("learnt-error", at("study"), async () => {
    const { session } = state;
    at("learning").textContent = "Reading what you said again. This can take a minute.";
    try {
      const { episodes } = await json(userPath("/study"), { method: "POST", body: {} });
      if (session !== state.session) return;
      at("learning").textContent = episodes
        ? `Studied ${plural(episodes, "message", "messages")}. Ask about it in a new conversation.`
        : "There is nothing new to study. Say something first.";
    } catch (error) {
      at("learning").textContent = "";
      throw error;
    }
    await refreshPanel();
  });
}

async function exportWeights() {
  await act("data-error", at("export"), async () => {
    const data = await (await call(userPath("/export"))).blob(); // a plain link could not send the key
    const link = make("a");
    link.href = URL.createObjectURL(data);
    link.download = `${state.user}-adapter.zip`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    at("data-note").textContent = `Saved ${link.download}. PEFT and vLLM can load it.`;
  });
}

async function forget() {
  const text = "Everything that was learnt from you is removed from this server, with all versions. This cannot be undone.";
  if (!(await confirmed("Forget everything?", text, "Forget everything"))) return;
  await act("data-error", at("forget"), async () => {
    await call(userPath(), { method: "DELETE" });
    await begin();
    at("data-note").textContent = "Everything was forgotten.";
  });
  at("forget").disabled = !state.known;
}

// -- the chat -------------------------------------------------------------------------------------------------------

function addTurn(role, text) {
  at("chat-empty").hidden = true;
  const turn = make("div", `turn ${role}`);
  turn.append(make("span", "hidden", role === "user" ? "You: " : "Model: "), make("span", "words", text));
  at("turns").append(turn);
  scrollToEnd();
  return turn;
}

function addNote(text) {
  at("turns").append(make("p", "turn-note", text));
  scrollToEnd();
}

const scrollToEnd = () => { at("turns").scrollTop = at("turns").scrollHeight; };

/** Whoever has scrolled up to read stays there while more is written. */
function appendWords(turn, text) {
  const view = at("turns");
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  turn.querySelector(".words").textContent += text;
  if (atEnd) scrollToEnd();
}

function newConversation() {
  state.answering?.abort();
  state.conversation = [];
  at("turns").replaceChildren(at("chat-empty"));
  at("chat-empty").hidden = false;
}

function setAnswering(controller) {
  state.answering = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
}

async function send(event) {
  event?.preventDefault();
  const text = at("text").value.trim();
  if (!text || state.answering) return;
  at("text").value = "";
  for (const error of at("turns").querySelectorAll(".error")) error.remove();
  const conversation = state.conversation;
  conversation.push({ role: "user", content: text });
  const mine = addTurn("user", text);
  const turn = addTurn("assistant", "");
  turn.setAttribute("aria-busy", "true"); // read aloud when it is complete, not word by word
  const controller = new AbortController();
  setAnswering(controller);
  let end = null;
  try {
    end = await answer(conversation, turn, controller.signal);
    if (end?.cut) addNote("The answer was cut off here: it was getting too long.");
  } catch (error) {
    if (conversation === state.conversation) failed(error, text, mine, turn, conversation);
  } finally {
    turn.removeAttribute("aria-busy");
    const words = turn.querySelector(".words").textContent;
    if (words && turn.isConnected) conversation.push({ role: "assistant", content: words });
    if (state.answering === controller) setAnswering(null);
  }
  if (end) await act("learnt-error", null, () => afterAnswer(end.ttt));
}

async function ask(what, signal) {
  if (!state.model) await refreshStatus(); // whoever is quick has written before the page knew what is served
  const body = { model: state.model, stream: true, temperature: TEMPERATURE, ...what };
  const headers = { "x-ttt-learn": at("learn").checked ? "on" : "off" };
  try {
    return await call("/v1/chat/completions", { method: "POST", signal, headers, body });
  } catch (error) {
    if (error.code !== "context_length_exceeded" || !what.max_completion_tokens) throw error;
    return ask({ messages: what.messages }, signal); // there is less room than that: take what is left
  }
}

/** Stream an answer into `turn`; returns what the server said at its end. */
async function answer(messages, turn, signal) {
  const response = await ask({ messages, max_completion_tokens: LONGEST_ANSWER }, signal);
  let ttt = null, cut = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") return { ttt, cut };
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message, chunk.error.code);
    const choice = chunk.choices[0];
    if (choice?.delta?.content) appendWords(turn, choice.delta.content);
    if (choice?.finish_reason === "length") cut = true;
    ttt = chunk.ttt ?? ttt;
  }
  throw new ApiError(0, "the answer broke off");
}

/** The answer did not come to its end: it was stopped, or something went wrong. */
function failed(error, text, mine, turn, conversation) {
  const begun = turn.querySelector(".words").textContent !== "";
  if (!begun) { // as if it had not been sent
    conversation.pop();
    mine.remove();
    turn.remove();
    if (!at("text").value) at("text").value = text;
    at("chat-empty").hidden = conversation.length > 0;
  }
  if (error.name === "AbortError") {
    if (begun) addNote("You stopped the answer. Nothing was learnt from this turn.");
    return;
  }
  const note = make("p", "error", explain(error));
  note.setAttribute("role", "alert");
  at("turns").append(note);
  scrollToEnd();
  if (error.status === 401) askForKey();
}

async function afterAnswer(ttt) {
  if (!ttt) return;
  if (ttt.learning.startsWith("refused")) {
    at("learning").textContent = `The model did not learn from this: ${ttt.learning.replace(/^refused: ?/, "")}`;
  } else if (ttt.learning === "off") {
    at("learning").textContent = at("learn").checked ? "" : "Learning is off: the model answers, and learns nothing.";
    await refreshStatus();
  } else {
    await waitForLearning(ttt.updates ?? 0);
  }
}

// -- start ----------------------------------------------------------------------------------------------------------

at("composer").addEventListener("submit", send);
at("text").addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter accepts it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => state.answering?.abort());
at("new").addEventListener("click", () => { newConversation(); at("text").focus(); });
at("learn").addEventListener("change", () => {
  at("learning").textContent = at("learn").checked ? "" : "Learning is off: the model answers, and learns nothing.";
});
at("key-form").addEventListener("submit", useKey);
at("user-form").addEventListener("submit", useUser);
at("drop-key").addEventListener("click", dropKey);
at("study").addEventListener("click", study);
at("export").addEventListener("click", exportWeights);
at("forget").addEventListener("click", forget);
at("more").addEventListener("click", () => { state.allVersions = true; showVersions(state.known?.versions ?? []); });
begin();
