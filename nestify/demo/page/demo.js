/**
 * The page: fetches a nested file's header, then the bytes of the levels that are chosen, and runs them.
 *
 * A level's graph is an ONNX file without weights, stored next to the nested file. Its weights come from the nested
 * file: they are decoded here and handed to ONNX Runtime Web as the graph's external data. Names in the file are
 * shown as text only.
 */

import * as ort from "./ort.wasm.min.mjs";
import { NestedFile, weightsOf } from "./nested.js";
import { prepare } from "./pixels.js";

const MOST_CLASSES = 5;
const TIMED_RUNS = 10;
const TIMED_MILLISECONDS = 500;

const find = (id) => document.getElementById(id);

/** A level of the file, and what the page shows of it. */
class Level {
  constructor(page, number, about) {
    this.page = page;
    this.number = number;
    this.about = about;
    this.entry = page.file.levels[number - 1];
    this.session = undefined;
    this.element = find("level").content.firstElementChild.cloneNode(true);
    this.button = this.query("button");
    this.button.addEventListener("click", () => page.attempt(() => page.use(this)));
    this.query("h3").textContent = this.entry.name;
    this.query(".facts").textContent = factsOf(this.entry);
    this.query(".top1").textContent = percent(this.entry.metrics.top1);
    this.query(".time").textContent = "-";
    find("levels").append(this.element);
  }

  query(selector) {
    return this.element.querySelector(selector);
  }

  /** Show what the level still costs, and what its button does. */
  update() {
    const bytes = this.page.file.headerBytes + this.page.file.ends[this.number - 1] + this.about.bytes;
    this.query(".bytes").textContent = mebibytes(bytes);
    const missing = this.page.file.missingBytes(this.number);
    const cost = missing ? `fetch ${mebibytes(missing)}` : "nothing to fetch";
    this.button.textContent = `Use this level: ${cost}`;
    this.button.hidden = Boolean(this.session);
    this.button.disabled = this.page.busy;
  }

  /** Fetch what is missing, and make the network. */
  async open() {
    if (this.session) return;
    const { file } = this.page;
    const before = file.fetchedBytes;
    try {
      await file.fetchLevel(this.number, (bytes) => this.page.showFetched(before + bytes));
    } finally {
      this.page.showFetched(file.fetchedBytes);
    }
    const graph = await fetchWhole(this.about.graph);
    this.session = await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      externalData: [{ path: this.about.weights, data: weightsOf(file, this.number, this.about) }],
    });
  }

  /** Run the network on a picture, and show the classes that it predicts, and its time. */
  async run(input) {
    const size = this.page.file.manifest.model.preprocessing.input_size;
    const feeds = { images: new ort.Tensor("float32", input, [1, ...size]) };
    const { logits } = await this.session.run(feeds);
    const severalLabels = this.entry.metrics.map !== undefined;
    this.showClasses(severalLabels ? sigmoid(logits.data) : softmax(logits.data, this.entry.temperature ?? 1));
    await new Promise((resolve) => setTimeout(resolve)); // so that the browser shows them
    const times = [];
    const begin = performance.now();
    do {
      const start = performance.now();
      await this.session.run(feeds);
      times.push(performance.now() - start);
    } while (performance.now() - begin < TIMED_MILLISECONDS);
    // Only the last runs count: while it runs, the browser replaces the runtime's code by faster code.
    const last = times.slice(-TIMED_RUNS).sort((left, right) => left - right);
    this.query(".time").textContent = `${last[Math.floor(last.length / 2)].toPrecision(3)} ms`;
  }

  showClasses(shares) {
    const names = this.page.classNames(this.entry);
    const best = [...shares.keys()].sort((left, right) => shares[right] - shares[left]).slice(0, MOST_CLASSES);
    this.query(".classes").replaceChildren(
      ...best.map((index) => {
        const [line, bar, name, share] = ["li", "div", "span", "span"].map((tag) => document.createElement(tag));
        bar.className = "bar";
        bar.style.width = `${100 * shares[index]}%`;
        name.textContent = names?.[index] ?? `class ${index}`;
        share.className = "share";
        share.textContent = percent(100 * shares[index]);
        line.append(bar, name, share);
        return line;
      }),
    );
  }
}

/** The page as a whole: one file, its levels, and one picture. */
class Page {
  constructor(about, file) {
    this.about = about;
    this.file = file;
    this.busy = false;
    this.input = undefined;
    const { architecture, num_classes: classes, preprocessing } = file.manifest.model;
    find("title").textContent = `${architecture}: ${count(file.levels.length, "network")} in one file`;
    find("about").textContent =
      `Each level is a prefix of the file, and your browser fetches only the bytes of the level that you choose. ` +
      `${count(classes, "class", "classes")}, pictures of ${preprocessing.input_size.slice(1).join(" x ")} pixels.`;
    this.segments = file.levels.map((level) => this.addSegment(level));
    this.levels = about.levels.map((level, index) => new Level(this, index + 1, level));
    find("file").setAttribute("aria-label", `The bytes of the levels: ${file.levels.map(sizeOf).join(", ")}`);
    find("sparse").hidden = !file.levels.some(isOnlySparse);
    this.showFetched(0);
    this.update();
  }

  addSegment(level) {
    const [segment, fill, name] = ["div", "div", "span"].map((tag) => document.createElement(tag));
    segment.className = "segment";
    segment.style.flexGrow = level.data_bytes;
    segment.title = sizeOf(level);
    fill.className = "fill";
    name.className = "name";
    name.textContent = level.name;
    segment.append(fill, name);
    find("file").append(segment);
    return segment;
  }

  /** Show how much of the file has been fetched: the header, and so many data bytes. */
  showFetched(bytes) {
    const whole = this.file.headerBytes + this.file.ends.at(-1);
    let begin = 0;
    for (const [index, segment] of this.segments.entries()) {
      const size = this.file.levels[index].data_bytes;
      const share = size ? Math.min(1, Math.max(0, (bytes - begin) / size)) : 1;
      segment.firstElementChild.style.width = `${100 * share}%`;
      segment.classList.toggle("whole", share === 1);
      begin += size;
    }
    const fetched = `Fetched ${mebibytes(this.file.headerBytes + bytes)} of ${mebibytes(whole)}.`;
    const unchecked = " Hashes are not checked, because browsers do so only on https:// and localhost.";
    find("fetched").textContent = fetched + (globalThis.crypto?.subtle ? "" : unchecked);
  }

  update() {
    for (const level of this.levels) level.update();
  }

  classNames(entry) {
    const classes = this.file.manifest.hierarchy?.find((each) => each.name === entry.classes);
    return entry.classes ? classes?.class_names : this.file.manifest.model.class_names;
  }

  /** Do something that takes a while, with all buttons disabled, and show what goes wrong. */
  async attempt(work) {
    if (this.busy) return;
    this.busy = true;
    this.update();
    showProblem("");
    try {
      await work();
    } catch (error) {
      showProblem(error.message);
    } finally {
      this.busy = false;
      this.update();
    }
  }

  /** Fetch a level, and run it; the other levels that have been fetched too, so that their times compare. */
  async use(level) {
    await this.marked(level, () => level.open());
    if (!this.input) return;
    const others = this.levels.filter((each) => each.session && each !== level);
    for (const each of [level, ...others]) await this.marked(each, () => each.run(this.input));
  }

  /** Take a picture, and run every level that has been fetched; the first picture fetches the core level. */
  async take(blob) {
    const { preprocessing } = this.file.manifest.model;
    const { pixels, input } = prepare(await decode(blob, preprocessing.exif_orientation), preprocessing);
    this.input = input;
    show(pixels);
    await this.use(this.levels.find((level) => level.session) ?? this.levels[0]);
  }

  async marked(level, work) {
    level.element.classList.add("running");
    try {
      await work();
    } finally {
      level.element.classList.remove("running");
    }
  }

  listen() {
    const drop = find("drop");
    const take = (blob) => blob && this.attempt(() => this.take(blob));
    find("choose").addEventListener("change", (event) => take(event.target.files[0]));
    for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
      drop.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", name.endsWith("enter") || name.endsWith("over"));
        if (name === "drop") take(event.dataTransfer.files[0]);
      });
    }
    document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
    for (const name of this.about.pictures) {
      const [button, image] = ["button", "img"].map((tag) => document.createElement(tag));
      button.type = "button";
      image.src = name;
      image.alt = `Example: ${name}`;
      button.append(image);
      button.addEventListener("click", async () => take(await (await fetch(name)).blob()));
      find("samples").append(button);
    }
  }
}

/** Return the pixels of a picture: width, height, and red, green, blue and alpha of each. */
async function decode(blob, upright) {
  const imageOrientation = upright ? "from-image" : "none";
  const options = { imageOrientation, premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(blob, options).catch(() => {
    throw new Error("This is not a picture that the browser can read.");
  });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** Show the pixels that the networks see. */
function show({ width, height, channels, data }) {
  const canvas = find("seen");
  canvas.width = width;
  canvas.height = height;
  canvas.hidden = false;
  const image = new ImageData(width, height);
  for (let i = 0, j = 0; i < data.length; i += channels, j += 4) {
    for (let channel = 0; channel < 3; channel++) image.data[j + channel] = data[i + (channel % channels)];
    image.data[j + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  find("hint").textContent = "This is what the networks see. Drop or choose another picture.";
}

function showProblem(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

async function fetchWhole(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be fetched (HTTP ${answer.status}).`);
  return new Uint8Array(await answer.arrayBuffer());
}

function softmax(logits, temperature) {
  const highest = logits.reduce((left, right) => Math.max(left, right), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp((logit - highest) / temperature));
  const total = powers.reduce((left, right) => left + right, 0);
  return powers.map((power) => power / total);
}

function sigmoid(logits) {
  return Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit)));
}

function factsOf({ achieved_sparsity: sparsity, width = 1, depth = 1 }) {
  const facts = [];
  if (width < 1) facts.push(`width ${percent(100 * width)}`);
  if (depth < 1) facts.push(`depth ${percent(100 * depth)}`);
  if (sparsity > 0) facts.push(`sparsity ${percent(100 * sparsity)}`);
  return facts.join(", ") || "full";
}

/** Whether a level differs from the full one by zeros alone. */
function isOnlySparse({ achieved_sparsity: sparsity, width = 1, depth = 1 }) {
  return sparsity > 0 && width === 1 && depth === 1;
}

const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;
const mebibytes = (bytes) => `${(bytes / 2 ** 20).toFixed(2)} MiB`;
const percent = (value) => (value === undefined || value === null ? "-" : `${value.toFixed(1)} %`);
const sizeOf = (level) => `${level.name}: ${mebibytes(level.data_bytes)}`;

async function start() {
  try {
    ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
    const about = await (await fetch("demo.json")).json();
    const page = new Page(about, await NestedFile.open(about.file));
    page.listen();
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    find("fetched").textContent = "";
    showProblem(error.message);
  }
}

start();
