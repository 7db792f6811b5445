"use strict";
/* Capture and playback at 24 kHz, in whatever rate the sound card has. */

const WIRE_HZ = 24000;
const PACKET = 480;
const TAPS = 16;

/* Windowed-sinc interpolation of a stream: TAPS neighbours on each side of an output sample. */
class Resampler {
  constructor(from, to) {
    this.step = from / to;
    this.cutoff = Math.min(1, to / from) * 0.95;
    this.held = new Float32Array(2 * TAPS);
    this.position = TAPS;
  }
  push(samples) {
    const joined = new Float32Array(this.held.length + samples.length);
    joined.set(this.held);
    joined.set(samples, this.held.length);
    const output = [];
    for (; this.position + TAPS + 1 < joined.length; this.position += this.step) {
      output.push(this.at(joined, this.position));
    }
    const start = Math.max(0, Math.floor(this.position) - TAPS);
    this.held = joined.slice(start);
    this.position -= start;
    return output;
  }
  at(samples, position) {
    const middle = Math.floor(position);
    let sum = 0;
    for (let i = middle - TAPS + 1; i <= middle + TAPS; i++) {
      const x = position - i;
      const phase = Math.PI * this.cutoff * x;
      const sinc = Math.abs(x) < 1e-6 ? this.cutoff : Math.sin(phase) / (Math.PI * x);
      sum += samples[i] * sinc * (0.5 + 0.5 * Math.cos(Math.PI * x / (TAPS + 1)));
    }
    return sum;
  }
}

function peak(samples) {
  let most = 0;
  for (const sample of samples) most = Math.max(most, Math.abs(sample));
  return most;
}

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === WIRE_HZ ? null : new Resampler(sampleRate, WIRE_HZ);
    this.waiting = [];
  }
  process([input]) {
    const samples = input[0] || new Float32Array(128);
    const own = this.resampler ? this.resampler.push(samples) : samples;
    for (const sample of own) this.waiting.push(sample);
    while (this.waiting.length >= PACKET) {
      const packet = Float32Array.from(this.waiting.splice(0, PACKET));
      this.port.postMessage({ packet, peak: peak(packet) }, [packet.buffer]);
    }
    return true;
  }
}

/* Plays what comes, behind a jitter buffer: it grows when it runs dry, and shrinks in silence. */
const LEAST_MS = 40, MOST_MS = 400, GROW_MS = 30, SHRINK_MS = 5, QUIET = 0.004;

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === WIRE_HZ ? null : new Resampler(WIRE_HZ, sampleRate);
    this.queue = [];
    this.head = 0;
    this.targetMs = LEAST_MS;
    this.isFilling = true;
    this.underruns = this.dropped = this.blocks = 0;
    this.calm = 0;
    this.port.onmessage = ({ data }) => this.take(data);
  }
  take(data) {
    if (data === "flush") {
      this.queue = [];
      this.head = 0;
      this.isFilling = true;
      return;
    }
    const own = this.resampler ? Float32Array.from(this.resampler.push(data)) : data;
    if (own.length) this.queue.push(own);
  }
  get buffered() {
    return this.queue.reduce((sum, own) => sum + own.length, 0) - this.head;
  }
  next() {
    while (this.queue.length && this.head >= this.queue[0].length) {
      this.queue.shift();
      this.head = 0;
    }
    return this.queue.length ? this.queue[0][this.head++] : null;
  }
  /* In silence, drops a block that is beyond the target; all that is far beyond it. */
  trim(ms) {
    while (this.queue.length > 1 && 1000 * this.buffered / sampleRate > 2 * MOST_MS) {
      this.dropped += this.queue.shift().length - this.head;
      this.head = 0;
    }
    const first = this.queue[0];
    if (ms < this.targetMs + 40 || !first || this.head + 128 > first.length) return;
    if (peak(first.subarray(this.head, this.head + 128)) > QUIET && ms < MOST_MS) return;
    this.head += 128;
    this.dropped += 128;
  }
  process(_, [output]) {
    const channel = output[0];
    const ms = 1000 * this.buffered / sampleRate;
    if (this.isFilling && ms >= this.targetMs) this.isFilling = false;
    if (!this.isFilling) {
      this.trim(ms);
      for (let i = 0; i < channel.length; i++) {
        const sample = this.next();
        if (sample === null) {
          this.isFilling = true;
          this.underruns += 1;
          this.calm = 0;
          this.targetMs = Math.min(MOST_MS, this.targetMs + GROW_MS);
          break;
        }
        channel[i] = sample;
      }
    }
    if (++this.calm * channel.length > 10 * sampleRate) {
      this.calm = 0;
      this.targetMs = Math.max(LEAST_MS, this.targetMs - SHRINK_MS);
    }
    if (++this.blocks % 8 === 0) {
      const facts = { ms, targetMs: this.targetMs, underruns: this.underruns, dropped: this.dropped };
      this.port.postMessage({ ...facts, peak: peak(channel) });
    }
    return true;
  }
}

registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
