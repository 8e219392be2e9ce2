"use strict";

// Whatever the model writes is set as text (textContent), never as HTML.

const TEXTS = {
  en: {
    settings: "Settings", system: "System prompt", temperature: "Temperature", top_p: "Top p",
    repetition_penalty: "Repetition penalty", max_tokens: "Most tokens of an answer", seed: "Seed (empty: random)",
    api_key: "API key (if the server asks for one)", new: "New chat", send: "Send", stop: "Stop",
    input: "Write a message …", stopped: "stopped", length: "cut off at the most tokens", other: "中文",
    fault: "Error: ", unreachable: "the server cannot be reached", broken: "the answer broke off",
  },
  zh: {
    settings: "设置", system: "系统提示", temperature: "温度", top_p: "Top p", repetition_penalty: "重复惩罚",
    max_tokens: "回答的最大词元数", seed: "随机种子（留空则随机）", api_key: "API 密钥（如服务器要求）", new: "新对话",
    send: "发送", stop: "停止", input: "输入消息……", stopped: "已停止", length: "已达到最大词元数", other: "English",
    fault: "错误：", unreachable: "无法连接服务器", broken: "回答中断",
  },
};

const $ = (id) => document.getElementById(id);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let history = [];
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

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

async function findModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await errorOf(response));
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

function request() {
  const body = { model, messages: [...history], stream: true };
  const system = $("system").value;
  if (system.trim()) body.messages.unshift({ role: "system", content: system });
  for (const name of ["temperature", "top_p", "repetition_penalty", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
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
  if (model === null) await findModel();
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request()), signal,
  });
  if (!response.ok) throw new Error(await errorOf(response));
  let reason = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return reason;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
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
  let failed = false;
  try {
    if ((await answer(element, controller.signal)) === "length") note(text("length"));
  } catch (error) {
    if (controller.signal.aborted) {
      if (conversation === history) note(text("stopped"));
    } else {
      failed = element.textContent === "";
      note(text("fault") + (error instanceof TypeError ? text("unreachable") : error.message), true);
    }
  } finally {
    setRunning(null);
  }
  if (conversation !== history) return; // a new chat was begun
  if (failed) {
    // Nothing was answered: the question goes back, so that it can be sent again.
    history.pop();
    asked.remove();
    element.remove();
    if (!$("input").value) $("input").value = input;
  } else {
    history.push({ role: "assistant", content: element.textContent });
  }
}

function begin() {
  running?.abort();
  history = [];
  $("messages").replaceChildren();
  $("input").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("keydown", (event) => {
  // Enter while an input method is open chooses a character.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
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
