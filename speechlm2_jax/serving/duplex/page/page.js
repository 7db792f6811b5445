"use strict";

const at = (id) => document.getElementById(id);
const HZ = 24000;
const SHOWN_S = 20;
const DRAW_MS = 50;
const MOST_UNSENT = 64000; // bytes: a second of audio
const state = {
  facts: null, socket: null, audio: null, stream: null, capture: null, playback: null,
  muted: false, response: null, turn: null, userTurn: null, ended: true,
};
/* What was sent and received, on the clock of the user's samples; kept for the download. */
const record = { user: [], agent: [], turns: [], begun: null, sent: 0, received: 0, known: 0, latencies: [] };
const levels = { user: [], agent: [] };
const play = { ms: 0, targetMs: 0, underruns: 0 };
/* Sent samples and when they were captured: the arrival of their frame tells the latency. */
let departures = [];

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function say(message) {
  at("status").textContent = message;
}

async function watchReadiness() {
  for (;;) {
    try {
      const reply = await fetch("ready");
      const facts = await reply.json();
      if (reply.ok) {
        state.facts = facts;
        at("model").textContent = facts.model;
        if (!state.socket) say("ready");
        at("connect").disabled = false;
        return;
      }
      say(facts.waits_for || facts.error.message);
    } catch {
      say("no connection to the server");
    }
    await new Promise((wake) => setTimeout(wake, 1000));
  }
}

/* ---- microphone ---- */

const REFUSALS = {
  NotAllowedError: "The microphone was refused. Allow it by the symbol beside the page's address, then connect again.",
  NotFoundError: "No microphone was found. Plug one in, then connect again.",
  NotReadableError: "The microphone is in use by another program.",
};

async function openMicrophone() {
  if (!navigator.mediaDevices) {
    throw new Error(
      "Browsers give the microphone only to localhost and to https pages. Open this page as " +
      `http://localhost:${location.port}, for example through ssh -L ${location.port}:localhost:${location.port} ` +
      `${location.hostname}.`,
    );
  }
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: {
        echoCancellation: at("echo").checked, noiseSuppression: at("noise").checked,
        autoGainControl: true, channelCount: 1,
      },
    });
  } catch (error) {
    throw new Error(REFUSALS[error.name] || `The microphone cannot be used: ${error.message}`);
  }
}

async function openAudio() {
  state.stream = await openMicrophone();
  const audio = new AudioContext({ latencyHint: "interactive" });
  state.audio = audio;
  await audio.audioWorklet.addModule("worklet.js");
  await audio.resume();
  const options = { numberOfInputs: 1, numberOfOutputs: 1, outputChannelCount: [1] };
  state.capture = new AudioWorkletNode(audio, "capture", { ...options, channelCount: 1, channelCountMode: "explicit" });
  state.playback = new AudioWorkletNode(audio, "playback", { ...options, numberOfInputs: 0 });
  state.capture.port.onmessage = ({ data }) => send(data.packet, data.peak);
  state.playback.port.onmessage = ({ data }) => {
    if (!state.playback) return;
    Object.assign(play, data);
    meter("agent", data.peak);
  };
  audio.createMediaStreamSource(state.stream).connect(state.capture).connect(audio.destination);
  state.playback.connect(audio.destination);
}

function closeAudio() {
  if (state.stream) state.stream.getTracks().forEach((track) => track.stop());
  if (state.audio) state.audio.close();
  state.stream = state.audio = state.capture = state.playback = null;
}

/* ---- the connection ---- */

function address(key) {
  const url = new URL("v1/realtime?frames=true", location);
  url.protocol = url.protocol.replace("http", "ws");
  const isToken = /^[\w.~-]+$/.test(key);
  if (key && !isToken) url.searchParams.set("key", key);
  return [url, key && isToken ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"]];
}

async function connect() {
  at("connect").disabled = true;
  fail("");
  say("asking for the microphone");
  try {
    await openAudio();
  } catch (error) {
    closeAudio();
    fail(error.message);
    say("not connected");
    at("connect").disabled = false;
    return;
  }
  restart();
  say("connecting");
  const socket = new WebSocket(...address(at("key").value.trim()));
  state.socket = socket;
  socket.onopen = () => {
    say("connected");
    controls(true);
  };
  socket.onmessage = ({ data }) => receive(JSON.parse(data));
  socket.onclose = (event) => disconnected(socket, event);
}

function restart() {
  Object.assign(record, { user: [], agent: [], turns: [], begun: new Date(), sent: 0, received: 0, known: 0, latencies: [] });
  levels.user = [];
  levels.agent = [];
  departures = [];
  Object.assign(state, { response: null, turn: null, userTurn: null, ended: false });
  at("turns").replaceChildren();
  at("empty").hidden = false;
  at("facts").textContent = "";
  requestAnimationFrame(draw);
}

function controls(isOn) {
  at("connect").disabled = false;
  at("connect").textContent = isOn ? "End" : "Connect";
  at("connect").classList.toggle("main", !isOn);
  at("mute").disabled = !isOn;
  at("interrupt").disabled = !(isOn && state.response);
  at("download").disabled = isOn || !record.sent;
}

async function disconnected(socket, event) {
  if (state.socket !== socket) return;
  state.socket = null;
  state.ended = true;
  state.response = null;
  closeAudio();
  meter("user", 0);
  meter("agent", 0);
  controls(false);
  say("not connected");
  if (event.code === 1000 || event.code === 1005) return;
  if (event.reason) return fail(event.reason);
  try {
    const facts = await (await fetch("ready")).json();
    if (facts.needs_key && !record.received) return fail("The server needs a key: give it in the settings.");
  } catch {
    return fail("The connection to the server is lost.");
  }
  fail(`The connection was closed (code ${event.code}).`);
}

function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

function send(packet, level) {
  const socket = state.socket;
  if (!socket || socket.readyState !== WebSocket.OPEN) return;
  if (socket.bufferedAmount > MOST_UNSENT) return; // the network is too slow: late audio is of no use
  if (state.muted) packet.fill(0);
  const pcm = Int16Array.from(packet, (sample) => Math.round(32767 * Math.max(-1, Math.min(1, sample))));
  const audio = base64(new Uint8Array(pcm.buffer));
  socket.send(JSON.stringify({ type: "input_audio_buffer.append", audio }));
  record.user.push(pcm);
  record.sent += pcm.length;
  departures.push([record.sent / HZ, performance.now()]);
  levels.user.push([record.sent / HZ, state.muted ? 0 : level]);
  meter("user", state.muted ? 0 : level);
}

function receive(event) {
  const handler = HANDLERS[event.type];
  if (handler) handler(event);
}

const HANDLERS = {
  "speechlm2.frames": takeFrames,
  "response.created": () => {
    state.response = true;
    state.turn = turn("agent", record.known);
    at("interrupt").disabled = false;
  },
  "response.output_audio_transcript.delta": (event) => {
    state.turn.text += event.delta;
    state.turn.item.append(event.delta);
    at("turns").scrollTop = at("turns").scrollHeight;
  },
  "response.done": (event) => {
    if (state.turn) endTurn(state.turn, event.response.status === "cancelled" ? "interrupted" : "");
    state.response = state.turn = null;
    at("interrupt").disabled = true;
  },
  "input_audio_buffer.speech_started": (event) => {
    state.userTurn = turn("user", event.audio_start_ms / 1000);
  },
  "input_audio_buffer.speech_stopped": (event) => {
    if (state.userTurn) endTurn(state.userTurn, "", event.audio_end_ms / 1000);
    state.userTurn = null;
  },
  error: (event) => {
    if (event.error.code !== "response_cancel_not_active") fail(event.error.message);
  },
};

const now = () => record.sent / HZ;

function takeFrames(event) {
  const bytes = Uint8Array.from(atob(event.audio), (c) => c.charCodeAt(0));
  const pcm = new Int16Array(bytes.buffer);
  const samples = Float32Array.from(pcm, (sample) => sample / 32768);
  record.agent.push({ at: event.end_s, pcm });
  record.received += pcm.length;
  record.known = event.end_s;
  for (let i = 0; i < samples.length; i += 480) {
    let most = 0;
    for (const sample of samples.subarray(i, i + 480)) most = Math.max(most, Math.abs(sample));
    levels.agent.push([event.end_s + i / HZ, most, event.is_in_turn]);
  }
  latency(event);
  if (state.playback) state.playback.port.postMessage(samples, [samples.buffer]);
}

/* From the capture of a chunk's last sample to the arrival of the agent's, and what is buffered. */
function latency(event) {
  let captured = null;
  while (departures.length && departures[0][0] <= event.end_s + 1e-6) captured = departures.shift()[1];
  if (captured === null) return;
  record.latencies.push(performance.now() - captured);
  const last = record.latencies.slice(-50).sort((a, b) => a - b);
  const middle = Math.round(last[last.length >> 1]);
  at("facts").textContent =
    `reply ${middle} ms (model ${Math.round(event.compute_ms)} ms), playback +${Math.round(play.ms)} ms`;
}

function toggleMute() {
  state.muted = !state.muted;
  at("mute").setAttribute("aria-pressed", String(state.muted));
  at("mute").firstChild.textContent = state.muted ? "Unmute " : "Mute ";
}

function interrupt() {
  if (!state.response || !state.socket) return;
  state.socket.send(JSON.stringify({ type: "response.cancel" }));
  state.playback.port.postMessage("flush");
}

/* ---- turns ---- */

function clock(seconds) {
  const whole = Math.max(0, seconds);
  return `${Math.floor(whole / 60)}:${(whole % 60).toFixed(1).padStart(4, "0")}`;
}

function turn(role, start) {
  const item = document.createElement("li");
  item.className = role;
  const own = { role, start, end: null, text: "", item };
  item.dataset.head = `${role === "user" ? "You" : "Agent"}, ${clock(start)}`;
  at("turns").append(item);
  at("turns").scrollTop = at("turns").scrollHeight;
  at("empty").hidden = true;
  record.turns.push(own);
  return own;
}

function endTurn(own, note, end = record.known) {
  own.end = end;
  own.note = note;
  own.item.dataset.head += ` – ${clock(end)}${note ? `, ${note}` : ""}`;
}

/* ---- meters and timeline ---- */

function meter(side, level) {
  const decibels = Math.max(-60, 20 * Math.log10(level + 1e-6));
  const bar = at(`${side}-meter`);
  bar.setAttribute("aria-valuenow", String(Math.round(decibels)));
  bar.firstElementChild.style.width = `${Math.round(100 * (decibels + 60) / 60)}%`;
}

function draw() {
  const canvas = at("timeline");
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const end = Math.max(SHOWN_S, now()), begin = end - SHOWN_S;
  const x = (seconds) => (seconds - begin) / SHOWN_S * width;
  const lane = (height - 18) / 2;
  pen.fillStyle = color("--turn");
  for (const own of record.turns) {
    if (own.role !== "agent" || (own.end ?? end) < begin) continue;
    pen.fillRect(x(own.start), lane, x(own.end ?? end) - x(own.start), lane);
  }
  for (const [side, middle] of [["user", lane / 2], ["agent", 1.5 * lane]]) {
    levels[side] = levels[side].filter(([time]) => time > begin - 1);
    pen.fillStyle = color(`--${side}`);
    const step = Math.max(1, width * 0.02 / SHOWN_S);
    for (const [time, level] of levels[side]) {
      const tall = Math.max(1, Math.sqrt(Math.min(1, level)) * (lane - 4));
      pen.fillRect(x(time), middle - tall / 2, step, tall);
    }
  }
  pen.fillStyle = color("--quiet");
  pen.strokeStyle = color("--line");
  pen.font = "11px system-ui, sans-serif";
  pen.beginPath();
  for (let second = Math.ceil(begin / 5) * 5; second <= end; second += 5) {
    pen.moveTo(x(second), 0);
    pen.lineTo(x(second), 2 * lane);
    const label = `${Math.floor(second / 60)}:${String(second % 60).padStart(2, "0")}`;
    pen.fillText(label, Math.min(Math.max(x(second) - 11, 0), width - 24), height - 4);
  }
  pen.stroke();
  if (!state.ended) setTimeout(() => requestAnimationFrame(draw), DRAW_MS);
}

/* ---- download ---- */

/* A stereo WAV: the user left, the agent right, each agent chunk where it was known. */
function wav() {
  const length = Math.max(record.sent, ...record.agent.map(({ at, pcm }) => Math.round(at * HZ) + pcm.length));
  const samples = new Int16Array(2 * length);
  let position = 0;
  for (const pcm of record.user) {
    for (let i = 0; i < pcm.length; i++) samples[2 * (position + i)] = pcm[i];
    position += pcm.length;
  }
  for (const { at: second, pcm } of record.agent) {
    const start = Math.round(second * HZ);
    for (let i = 0; i < pcm.length; i++) samples[2 * (start + i) + 1] = pcm[i];
  }
  const head = new DataView(new ArrayBuffer(44));
  const text = (offset, value) => [...value].forEach((c, i) => head.setUint8(offset + i, c.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + samples.byteLength, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true);
  head.setUint16(22, 2, true);
  head.setUint32(24, HZ, true);
  head.setUint32(28, 4 * HZ, true);
  head.setUint16(32, 4, true);
  head.setUint16(34, 16, true);
  text(36, "data");
  head.setUint32(40, samples.byteLength, true);
  return new Blob([head.buffer, samples.buffer], { type: "audio/wav" });
}

function facts() {
  const sorted = [...record.latencies].sort((a, b) => a - b);
  const part = (share) => sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : null;
  return {
    model: state.facts && state.facts.model,
    begun: record.begun,
    sampling_rate_hz: HZ,
    channels: ["user", "agent"],
    duration_s: record.sent / HZ,
    reply_ms: { p50: part(0.5), p95: part(0.95) },
    playback: { underruns: play.underruns, target_ms: play.targetMs },
    turns: record.turns.map(({ role, start, end, text, note }) => ({ role, start_s: start, end_s: end, text, note })),
  };
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function download() {
  if (at("download").disabled) return;
  const name = `conversation-${record.begun.toISOString().slice(0, 19).replaceAll(":", "-")}`;
  save(wav(), `${name}.wav`);
  save(new Blob([JSON.stringify(facts(), null, 2)], { type: "application/json" }), `${name}.json`);
}

/* ---- events ---- */

at("connect").addEventListener("click", () => state.socket ? state.socket.close(1000) : connect());
at("mute").addEventListener("click", toggleMute);
at("interrupt").addEventListener("click", interrupt);
at("download").addEventListener("click", download);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  const id = { m: "mute", i: "interrupt", d: "download", Escape: "interrupt" }[event.key] || "";
  if (id && !at(id).disabled) at(id).click();
});
window.addEventListener("resize", () => requestAnimationFrame(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => requestAnimationFrame(draw));
at("key").value = sessionStorage.getItem("key") || "";
at("key").addEventListener("input", () => sessionStorage.setItem("key", at("key").value));
draw();
watchReadiness();
