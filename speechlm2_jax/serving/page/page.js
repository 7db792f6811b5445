"use strict";

const at = (id) => document.getElementById(id);
const state = { model: null, hasWords: false, blob: null, name: "", words: [], segments: [], turns: [], abort: null, recorder: null };

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

async function reason(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server responded with ${reply.status}`;
  }
}

/* The events of a stream, one by one. */
async function* events(reply) {
  if (!reply.ok) throw new Error(await reason(reply));
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the response did");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function watchReadiness() {
  for (;;) {
    try {
      const reply = await fetch("ready");
      const facts = await reply.json();
      if (reply.ok) {
        state.model = facts.model;
        state.hasWords = Boolean(facts.word_timestamps);
        at("status").textContent = facts.model;
        enable();
        return;
      }
      at("status").textContent = facts.waits_for;
    } catch {
      at("status").textContent = "no connection to the server";
    }
    await new Promise((wake) => setTimeout(wake, 1000));
  }
}

function enable() {
  at("send").disabled = !(state.model && state.blob) || Boolean(state.asking);
}

function setBusy(abort) {
  state.abort = abort;
  at("stop").hidden = !abort;
}

/* ---- recordings ---- */

function take(blob, name) {
  if (state.abort) state.abort.abort();
  state.blob = blob;
  state.name = name;
  state.turns = [];
  at("turns").replaceChildren();
  at("name").textContent = name;
  const player = at("player");
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(blob);
  player.hidden = false;
  enable();
  transcribe(blob, name);
}

async function toggleRecording() {
  if (state.recorder) {
    state.recorder.stop();
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    fail(`the microphone cannot be used: ${error.message}`);
    return;
  }
  fail("");
  const pieces = [];
  const recorder = new MediaRecorder(stream);
  const begun = Date.now();
  const clock = setInterval(() => {
    at("record").textContent = `Stop recording (${Math.round((Date.now() - begun) / 1000)} s)`;
  }, 500);
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = () => {
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());
    state.recorder = null;
    at("record").textContent = "Record";
    at("record").setAttribute("aria-pressed", "false");
    take(new Blob(pieces, { type: recorder.mimeType }), "your recording");
  };
  state.recorder = recorder;
  at("record").textContent = "Stop recording";
  at("record").setAttribute("aria-pressed", "true");
  recorder.start();
}

/* ---- transcription ---- */

async function transcribe(blob, name) {
  const abort = new AbortController();
  const text = at("text");
  setBusy(abort);
  fail("");
  state.words = [];
  state.segments = [];
  text.replaceChildren();
  at("facts").textContent = "";
  at("spoken").textContent = "";
  at("copy").hidden = at("srt").hidden = true;
  const begun = performance.now();
  const form = new FormData();
  form.append("file", blob, name);
  if (state.model) form.append("model", state.model);
  form.append("stream", "true");
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "segment");
  if (state.hasWords) form.append("timestamp_granularities[]", "word");
  try {
    const reply = await fetch("v1/audio/transcriptions", {
      method: "POST", body: form, headers: headers(), signal: abort.signal,
    });
    for await (const event of events(reply)) {
      if (event.type === "transcript.text.delta") text.append(event.delta);
      if (event.type === "transcript.text.done") finish(event, (performance.now() - begun) / 1000);
    }
  } catch (error) {
    if (abort.signal.aborted) at("facts").textContent = "stopped";
    else fail(error.message);
  } finally {
    if (state.abort === abort) setBusy(null);
  }
}

function finish(event, seconds) {
  const text = at("text");
  text.replaceChildren();
  state.segments = event.segments.filter((segment) => segment.text);
  showSegments([...(event.words || [])]);
  text.dataset.empty = "no words were found";
  at("spoken").textContent = event.text;
  at("copy").hidden = !event.text;
  at("srt").hidden = !state.segments.length;
  at("facts").textContent = `${seconds.toFixed(1)} s, ${event.usage.output_tokens} tokens`;
}

/* A paragraph for each segment, with its time where there are several. `words`: all, in order. */
function showSegments(words) {
  for (const segment of state.segments) {
    const item = document.createElement("p");
    if (state.segments.length > 1) item.dataset.time = clock(segment.start);
    at("text").append(item);
    const next = words.findIndex((word) => word.end > segment.end);
    const own = words.splice(0, next < 0 ? words.length : next);
    if (own.length) showWords(own, item);
    else item.append(segment.text, " ");
  }
}

function showWords(words, item) {
  for (const word of words) {
    const span = document.createElement("span");
    span.className = "word";
    span.textContent = word.word;
    span.addEventListener("click", () => seek(word.start));
    item.append(span, " ");
    state.words.push({ ...word, span });
  }
}

/* Seconds as 1:02:03, or 2:03 below an hour. */
function clock(seconds) {
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  const two = (number) => String(number).padStart(2, "0");
  const rest = two(Math.floor(seconds) % 60);
  return hours ? `${hours}:${two(minutes)}:${rest}` : `${minutes}:${rest}`;
}

function subtitles() {
  const time = (seconds) => new Date(1000 * seconds).toISOString().slice(11, 23).replace(".", ",");
  return state.segments.map(
    ({ start, end, text }, n) => `${n + 1}\n${time(start)} --> ${time(end)}\n${text}\n`,
  ).join("\n");
}

function saveSubtitles() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([subtitles()], { type: "application/x-subrip" }));
  link.download = `${state.name.replace(/\.[^.]*$/, "")}.srt`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function seek(seconds) {
  at("player").currentTime = seconds;
  highlight();
}

function highlight() {
  const now = at("player").currentTime;
  for (const word of state.words) {
    word.span.classList.toggle("now", word.start <= now && now < Math.max(word.end, word.start + 0.08));
  }
  if (!at("player").paused) requestAnimationFrame(highlight);
}

/* Arrow keys in the text move the player from word to word; Space plays. */
function move(event) {
  const player = at("player");
  if (event.key === " " && !player.hidden) {
    player.paused ? player.play() : player.pause();
  } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    const starts = state.words.map((word) => word.start);
    const now = player.currentTime;
    const next = event.key === "ArrowRight"
      ? starts.find((start) => start > now + 0.01)
      : starts.filter((start) => start < now - 0.01).pop();
    if (next === undefined) return;
    seek(next);
  } else {
    return;
  }
  event.preventDefault();
}

/* ---- questions ---- */

function turn(role, content) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = content;
  at("turns").append(item);
  return item;
}

async function base64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

async function ask(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || at("send").disabled) return;
  const blob = state.blob;
  state.asking = true;
  enable();
  turn("user", question);
  const item = turn("assistant", "");
  at("question").value = "";
  try {
    const audio = { type: "input_audio", input_audio: { data: await base64(blob), format: "wav" } };
    const [first, ...more] = [...state.turns, { role: "user", content: question }];
    const messages = [
      { role: "user", content: [audio, { type: "text", text: first.content }] }, ...more,
    ];
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify({ model: state.model, messages, stream: true }),
    });
    for await (const chunk of events(reply)) {
      if (chunk.choices.length) item.append(chunk.choices[0].delta.content || "");
    }
    if (blob === state.blob) {
      state.turns.push(
        { role: "user", content: question }, { role: "assistant", content: item.textContent },
      );
    }
    if (!item.textContent.trim()) item.textContent = "(an empty response)";
  } catch (error) {
    item.textContent = error.message;
    item.classList.add("failed");
  } finally {
    state.asking = false;
    enable();
  }
}

/* ---- events ---- */

at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) take(file, file.name);
  at("file").value = "";
});
at("record").addEventListener("click", toggleRecording);
at("stop").addEventListener("click", () => state.abort && state.abort.abort());
at("srt").addEventListener("click", saveSubtitles);
at("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(at("text").textContent.trim());
  at("copy").textContent = "Copied";
  setTimeout(() => { at("copy").textContent = "Copy"; }, 1500);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) take(file, file.name);
});
at("player").addEventListener("play", highlight);
at("player").addEventListener("seeked", highlight);
at("text").addEventListener("keydown", move);
at("text").dataset.empty = "The text appears here.";
at("ask").addEventListener("submit", ask);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) ask(event);
});
at("key").value = sessionStorage.getItem("key") || "";
at("key").addEventListener("input", () => sessionStorage.setItem("key", at("key").value));
if (!(navigator.mediaDevices && window.MediaRecorder)) at("record").hidden = true;
watchReadiness();
