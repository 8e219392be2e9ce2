"use strict";

// Whatever the model writes is set as text (textContent), never as HTML.

const TEXTS = {
  en: {
    settings: "Settings", system: "System prompt", temperature: "Temperature", top_p: "Top p",
    repetition_penalty: "Repetition penalty", max_tokens: "Most tokens of an answer", seed: "Seed (empty: random)",
    api_key: "API key (if the server asks for one)", new: "New chat", send: "Send", stop: "Stop",
    input: "Write a message …", stopped: "stopped", length: "cut off at the most tokens", other: "中文",
    fault: "Error: ", unreachable: "the server cannot be reached", broken: "the answer broke off",
    stopped_empty: "stopped before a word was said; the question is not kept", empty: "the answer is empty",
    left_out: "The conversation is too long for the model, which no longer sees its beginning. Questions left out with their answers: ",
    see_key: "enter the API key under Settings", see_busy: "the server is busy; send it again in a moment",
    see_stopping: "the server is shutting down; send it again when it is back",
    see_length: "shorten the message or the system prompt, or lower the most tokens of an answer under Settings",
    see_size: "shorten the message", see_template: "this model was not trained on conversations",
    see_setting: "change it under Settings: ", see_server: "the fault is the server's; its log says more",
  },
  zh: {
    settings: "设置", system: "系统提示", temperature: "温度", top_p: "Top p", repetition_penalty: "重复惩罚",
    max_tokens: "回答的最大词元数", seed: "随机种子（留空则随机）", api_key: "API 密钥（如服务器要求）", new: "新对话",
    send: "发送", stop: "停止", input: "输入消息……", stopped: "已停止", length: "已达到最大词元数", other: "English",
    fault: "错误：", unreachable: "无法连接服务器", broken: "回答中断",
    stopped_empty: "还没有说出一个字就停止了；这个问题不保留", empty: "回答是空的",
    left_out: "对话对模型来说太长，模型不再看到它的开头。省去的问题及其回答的数目：",
    see_key: "请在“设置”中填写 API 密钥", see_busy: "服务器繁忙，请稍后再发送",
    see_stopping: "服务器正在关闭，请等它恢复后再发送",
    see_length: "请缩短消息或系统提示，或在“设置”中减小回答的最大词元数",
    see_size: "请缩短消息", see_template: "这个模型没有在对话上训练过",
    see_setting: "请在“设置”中修改：", see_server: "这是服务器的错误，详见其日志",
  },
};

const SETTINGS = ["temperature", "top_p", "repetition_penalty", "max_tokens", "seed"];
const MAX_TOKENS = 256; // of an answer, unless the server allows less, or its context is small
const HINTS = {
  invalid_api_key: "see_key", queue_full: "see_busy", shutting_down: "see_stopping",
  context_length_exceeded: "see_length", request_too_large: "see_size", no_chat_template: "see_template",
};
const TOO_LONG = ["context_length_exceeded", "request_too_large"];

const $ = (id) => document.getElementById(id);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let history = [];
let leftOut = 0; // exchanges at the beginning of the history that the model no longer sees
let model = null;
let running = null; // the AbortController of the answer that is being written

function text(key) {
  return TEXTS[language][key];
}

function showTexts() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = text(element.dataset.placeholder);
    element.setAttribute("aria-label", element.placeholder);
  }
  $("language").textContent = text("other");
}

function headers() {
  const key = $("api_key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function add(kind, content) {
  const element = document.createElement("div");
  element.className = kind;
  element.dir = "auto";
  element.textContent = content;
  $("messages").append(element);
  scroll(true);
  return element;
}

function note(content, isFault = false) {
  add(isFault ? "message note fault" : "message note", content);
}

// Follow the answer, unless the reader has scrolled up.
function scroll(always = false) {
  const messages = $("messages");
  const isAtEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 120;
  if (always || isAtEnd) messages.scrollTop = messages.scrollHeight;
}

// What the server says is wrong: its words, and a hint in the language of the page.
class ServerError extends Error {
  constructor({ message, code, param, type }) {
    super(message);
    this.code = code;
    this.param = param;
    this.type = type;
  }

  explained() {
    const hint = this.hint();
    return hint ? `${hint} (${this.message})` : this.message;
  }

  hint() {
    if (HINTS[this.code]) return text(HINTS[this.code]);
    if (SETTINGS.includes(this.param)) return text("see_setting") + text(this.param);
    return this.type === "server_error" ? text("see_server") : "";
  }
}

async function errorOf(response) {
  try {
    return new ServerError((await response.json()).error);
  } catch {
    return new Error(`HTTP ${response.status}`); // of a proxy
  }
}

async function findModel(signal) {
  const response = await fetch("/v1/models", { headers: headers(), signal });
  if (!response.ok) throw await errorOf(response);
  model = (await response.json()).data[0];
  $("model").textContent = model.id;
  $("max_tokens").placeholder = defaultTokens();
}

function defaultTokens() {
  return Math.max(1, Math.min(MAX_TOKENS, model.max_output_tokens, Math.floor(model.max_model_len / 2)));
}

// The body of a request, without so many of the oldest exchanges.
function request(skipped) {
  const body = { model: model.id, messages: history.slice(2 * skipped), stream: true, max_tokens: defaultTokens() };
  const system = $("system").value;
  if (system.trim()) body.messages.unshift({ role: "system", content: system });
  for (const name of SETTINGS) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

function post(body, signal) {
  return fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
}

// The server's answer to the conversation, or to as much of its end as fits.
async function ask(signal) {
  if (model === null) await findModel(signal);
  let skipped = leftOut;
  let isFresh = false; // whether the model was found again
  for (;;) {
    const response = await post(request(skipped), signal);
    const error = response.ok ? null : await errorOf(response);
    signal.throwIfAborted(); // a new chat may have begun
    if (error === null) {
      if (skipped > leftOut) note(text("left_out") + skipped);
      leftOut = skipped;
      return response;
    }
    if (error.code === "model_not_found" && !isFresh) {
      isFresh = true; // the server was started again, with another one
      skipped = 0;
      await findModel(signal);
    } else if (TOO_LONG.includes(error.code) && 2 * skipped < history.length - 1) {
      skipped += 1;
    } else {
      throw error;
    }
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

// Write an answer into an element; returns why it ended, or throws.
async function answer(element, signal) {
  const response = await ask(signal);
  let reason = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return reason;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error);
    const choice = chunk.choices[0];
    element.textContent += choice.delta.content ?? "";
    reason = choice.finish_reason ?? reason;
    scroll();
  }
  throw new Error(text("broken"));
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
}

async function send() {
  const input = $("input").value;
  if (running !== null || !input.trim()) return;
  history.push({ role: "user", content: input });
  const asked = add("message user", input);
  $("input").value = "";
  const controller = new AbortController();
  setRunning(controller);
  const conversation = history;
  const element = add("message assistant", "");
  let isKept = true;
  try {
    const reason = await answer(element, controller.signal);
    if (reason === "length") note(text("length"));
    else if (!element.textContent.trim()) note(text("empty"));
  } catch (error) {
    isKept = element.textContent !== "";
    if (conversation !== history) return; // a new chat was begun
    if (controller.signal.aborted) note(text(isKept ? "stopped" : "stopped_empty"));
    else note(explained(error), true);
  } finally {
    setRunning(null);
  }
  if (conversation !== history) return; // a new chat was begun
  if (isKept) {
    history.push({ role: "assistant", content: element.textContent });
  } else {
    // Nothing was answered: the question goes back, so that it can be sent again.
    history.pop();
    asked.remove();
    element.remove();
    if (!$("input").value) $("input").value = input;
  }
}

function explained(error) {
  if (error instanceof ServerError) return text("fault") + error.explained();
  return text("fault") + (error instanceof TypeError ? text("unreachable") : error.message);
}

function begin() {
  running?.abort();
  history = [];
  leftOut = 0;
  $("messages").replaceChildren();
  $("input").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("keydown", (event) => {
  // Enter while an input method is open chooses a character; Safari has ended composing by then, and says 229.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    send();
  }
});
// With these, other parts of the conversation fit.
for (const id of ["system", "max_tokens"]) $(id).addEventListener("change", () => (leftOut = 0));
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", begin);
$("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  showTexts();
});

showTexts();
findModel().catch(() => {
  $("settings").open = true; // most likely a key is missing; sending says what is wrong
});
