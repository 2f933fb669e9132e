/**
 * Nested files in a browser: the header, the bytes of one level, and the dense tensors of that level.
 *
 * A nested file is a safetensors file in level-major order: level k needs the header and the first bytes of the
 * data, nothing after them. A level that is fetched later therefore costs only the bytes that are still missing.
 */

const HEADER_LENGTH_BYTES = 8;
const MAX_HEADER_BYTES = 64 * 2 ** 20;
const ALIGNMENT = 8;
const SIZES = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 };

/**
 * Fetch bytes [begin, end) of a file.
 *
 * @param {string} url address of the file.
 * @param {(bytes: number) => void} [progress] called with the number of bytes that have arrived.
 * @returns {Promise<Uint8Array>}
 */
export async function fetchRange(url, begin, end, progress = () => {}) {
  const answer = await fetch(url, { headers: { Range: `bytes=${begin}-${end - 1}` } });
  if (answer.status === 200) {
    await answer.body?.cancel();
    throw new Error("The server sends whole files only. Use one that supports range requests, or nestify demo --serve.");
  }
  if (answer.status !== 206) throw new Error(`The server answered with HTTP ${answer.status}.`);
  const bytes = new Uint8Array(end - begin);
  let count = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (count + value.length > bytes.length) throw new Error("The server sent more bytes than requested.");
    bytes.set(value, count);
    progress((count += value.length));
  }
  if (count !== bytes.length) throw new Error("The connection was lost. Try again.");
  return bytes;
}

/** A nested file on a server; `levels`, `manifest` and `headerBytes` are known, its data is fetched by level. */
export class NestedFile {
  /**
   * @param {string} url address of the file.
   * @param {Uint8Array} header the JSON header, without the eight bytes before it.
   */
  constructor(url, header) {
    const content = JSON.parse(new TextDecoder().decode(header));
    const { "nestify.format": format, "nestify.manifest": manifest } = content.__metadata__ ?? {};
    if (format !== "1") throw new Error("This is not a nested file of format 1.");
    delete content.__metadata__;
    this.url = url;
    this.headerBytes = HEADER_LENGTH_BYTES + header.length;
    this.manifest = JSON.parse(manifest);
    this.levels = this.manifest.levels;
    this.tensors = new Map(Object.entries(content));
    this.parameters = new Map(this.manifest.parameters.map((parameter) => [parameter.name, parameter]));
    this.ends = [];
    for (const level of this.levels) this.ends.push((this.ends.at(-1) ?? 0) + level.data_bytes);
    this.chunks = [];
  }

  /** Fetch the header of a file, in two requests. */
  static async open(url) {
    const length = new DataView((await fetchRange(url, 0, HEADER_LENGTH_BYTES)).buffer).getBigUint64(0, true);
    if (length > MAX_HEADER_BYTES) throw new Error("This is not a nested file: its header would be too large.");
    const end = HEADER_LENGTH_BYTES + Number(length);
    return new NestedFile(url, await fetchRange(url, HEADER_LENGTH_BYTES, end));
  }

  /** Number of levels whose bytes have been fetched. */
  get fetchedLevels() {
    return this.chunks.length;
  }

  /** Number of data bytes that have been fetched. */
  get fetchedBytes() {
    return this.ends[this.fetchedLevels - 1] ?? 0;
  }

  /** Number of data bytes that a level still needs. */
  missingBytes(level) {
    return Math.max(0, this.ends[level - 1] - this.fetchedBytes);
  }

  /**
   * Fetch the bytes that a level still needs, in one request, and check the hash of every chunk.
   *
   * @param {number} level number of the level, 1 for the core level.
   * @param {(bytes: number) => void} [progress] see `fetchRange`.
   * @returns {Promise<number>} number of bytes that were fetched.
   */
  async fetchLevel(level, progress) {
    const missing = this.missingBytes(level);
    if (!missing) return 0;
    const first = this.headerBytes + this.fetchedBytes;
    await this.addBytes(await fetchRange(this.url, first, first + missing, progress));
    return missing;
  }

  /** Take the bytes of the next levels, which must be whole. */
  async addBytes(bytes) {
    for (let offset = 0; offset < bytes.length; ) {
      const level = this.levels[this.fetchedLevels];
      const chunk = bytes.subarray(offset, offset + level.data_bytes);
      if (!(await hasHash(chunk, level.sha256))) {
        throw new Error(`The bytes of level ${level.name} do not match their SHA-256.`);
      }
      this.chunks.push(chunk);
      offset += level.data_bytes;
    }
  }

  /** Return the bytes of a stored tensor, and its type; undefined if it is not stored. */
  stored(level, name) {
    const tensor = this.tensors.get(name);
    if (!tensor) return undefined;
    const start = this.ends[level - 2] ?? 0;
    const [begin, end] = tensor.data_offsets;
    return { bytes: this.chunks[level - 1].subarray(begin - start, end - start), dtype: tensor.dtype };
  }

  /** Return a stored tensor as float32, or as it is if it does not hold floating-point numbers. */
  values(level, name) {
    const { bytes, dtype } = this.stored(level, name);
    const aligned = bytes.byteOffset % SIZES[dtype] === 0 ? bytes : bytes.slice();
    const { buffer, byteOffset } = aligned;
    const count = bytes.length / SIZES[dtype];
    if (dtype === "F32") return new Float32Array(buffer, byteOffset, count);
    if (dtype === "BF16") return fromBfloat16(new Uint16Array(buffer, byteOffset, count));
    if (dtype === "F16") return fromFloat16(new Uint16Array(buffer, byteOffset, count));
    throw new Error(`${name} holds ${dtype}, which a page cannot use.`);
  }

  /** Return a tensor that belongs to one level, such as its batch norm. */
  privateTensor(level, name) {
    return this.values(level, `level${level}/private/${name}`);
  }

  /**
   * Return a shared tensor as one level uses it: 0 where it uses no weight, without channels that it lacks.
   *
   * @param {number} level number of the level; its bytes must have been fetched.
   * @param {string} name name of the tensor.
   * @returns {Float32Array} elements in C order.
   */
  sharedTensor(level, name) {
    const parameter = this.parameters.get(name);
    if (!parameter.maskable) return this.values(1, `level1/values/${name}`);
    const entry = this.entryLevels(level, parameter);
    const values = [undefined];
    for (let k = 1; k <= level; k++) {
      values.push(parameter.entering[k - 1] ? this.values(k, `level${k}/values/${name}`) : new Float32Array(0));
    }
    const dense = new Float32Array(entry.length);
    const used = new Uint32Array(level + 1);
    for (let i = 0; i < entry.length; i++) {
      const k = entry[i];
      if (k <= level) dense[i] = values[k][used[k]++];
    }
    for (let k = 1; k <= level; k++) {
      if (used[k] !== values[k].length) throw new Error(`${name} is damaged: level ${k} has other values.`);
    }
    return box(dense, parameter, level);
  }

  /**
   * Return the lowest level that uses each element of a parameter; `level + 1` for those of higher levels.
   *
   * @returns {Uint8Array} one per element, in C order.
   */
  entryLevels(level, parameter) {
    const { shape, unit = [1, 1], axes = [] } = parameter;
    const grid = unitGrid(shape, unit);
    const units = firstLevels(grid, axes, level);
    for (let k = 1; k <= level; k++) {
      const coding = parameter.coding[k - 1];
      if (coding === "all") continue; // all units that are left enter
      let remaining = 0;
      for (let i = 0; i < units.length; i++) remaining += units[i] === k;
      const bytes = this.stored(k, `level${k}/entry/${parameter.name}`)?.bytes;
      const positions = decodePositions(coding, bytes, remaining, parameter.entering[k - 1]);
      let seen = 0;
      let next = 0;
      for (let i = 0; i < units.length; i++) {
        if (units[i] !== k) continue;
        if (positions[next] === seen++) next++;
        else units[i] = k + 1;
      }
      if (next !== positions.length) throw new Error(`${parameter.name} is damaged: positions of level ${k}.`);
    }
    return expandUnits(units, grid, shape, unit);
  }
}

/**
 * Return the weights of a level in the order in which its graph expects them.
 *
 * @param {NestedFile} file its levels up to this one must have been fetched.
 * @param {number} level number of the level.
 * @param {{ size: number, tensors: { name: string, private: boolean, offset: number }[] }} about number of bytes, and
 *   where each tensor begins.
 * @returns {Uint8Array} float32 values as bytes.
 */
export function weightsOf(file, level, about) {
  const weights = new Uint8Array(about.size);
  for (const { name, private: isPrivate, offset } of about.tensors) {
    const values = isPrivate ? file.privateTensor(level, name) : file.sharedTensor(level, name);
    weights.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), offset);
  }
  return weights;
}

/** Return whether bytes have a SHA-256; true where the browser cannot tell, as on a page without https. */
async function hasHash(bytes, sha256) {
  if (!globalThis.crypto?.subtle) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/** Return the shape of the grid of units: blocks of `unit` output x input channels; edges are ragged. */
function unitGrid(shape, [rows, cols]) {
  if (shape.length < 2) return shape;
  return [Math.ceil(shape[0] / rows), Math.ceil(shape[1] / cols), ...shape.slice(2)];
}

const product = (numbers) => numbers.reduce((left, right) => left * right, 1);

/** Return the lowest level that has each index of a dimension, from runs of (level, count). */
function axisLevels(runs, extent, level) {
  const levels = new Uint8Array(extent).fill(1);
  let begin = 0;
  for (const [lowest, count] of runs ?? []) levels.fill(Math.min(lowest, level + 1), begin, (begin += count));
  return levels;
}

/** Return the lowest level at which each unit can enter: the highest one of its indices. */
function firstLevels(grid, axes, level) {
  const units = new Uint8Array(product(grid)).fill(1);
  let inner = units.length;
  for (const [dim, extent] of grid.entries()) {
    inner /= extent || 1;
    if (!axes[dim]?.length) continue;
    const levels = axisLevels(axes[dim], extent, level);
    for (let i = 0; i < units.length; i++) {
      units[i] = Math.max(units[i], levels[Math.floor(i / inner) % extent]);
    }
  }
  return units;
}

/** Return the values of units, one per element. */
function expandUnits(units, grid, shape, [rows, cols]) {
  if (rows === 1 && cols === 1) return units;
  const elements = new Uint8Array(product(shape));
  const inner = product(shape.slice(2));
  let i = 0;
  for (let row = 0; row < shape[0]; row++) {
    for (let col = 0; col < shape[1]; col++) {
      const begin = (Math.floor(row / rows) * grid[1] + Math.floor(col / cols)) * inner;
      for (let k = 0; k < inner; k++) elements[i++] = units[begin + k];
    }
  }
  return elements;
}

/** Return the elements of a dense tensor whose indices a level has, in C order. */
function box(dense, { shape, axes = [] }, level) {
  const kept = shape.map((extent, dim) => {
    const levels = axisLevels(axes[dim], extent, level);
    return Array.from(levels.keys()).filter((index) => levels[index] <= level);
  });
  const size = product(kept.map((indices) => indices.length));
  if (size === dense.length) return dense;
  const found = new Float32Array(size);
  let count = 0;
  const copy = (dim, begin) => {
    if (dim === shape.length) {
      found[count++] = dense[begin];
      return;
    }
    for (const index of kept[dim]) copy(dim + 1, begin * shape[dim] + index);
  };
  copy(0, 0);
  return found;
}

/**
 * Return which of the remaining units enter, in ascending order.
 *
 * @param {string} coding `none`, `bits` (one bit per unit), or `elias-fano`.
 * @param {Uint8Array | undefined} bytes the coded positions.
 * @param {number} remaining number of units that no lower level uses.
 * @param {number} count number of units that enter.
 */
function decodePositions(coding, bytes, remaining, count) {
  const positions = new Float64Array(count); // whole numbers, also above 2 ** 32
  if (coding === "none") return positions;
  let found = 0;
  if (coding === "bits") {
    for (let i = 0; i < remaining; i++) {
      if ((bytes[i >> 3] >> (i & 7)) & 1) positions[found++] = i;
    }
    return positions;
  }
  const low = Math.floor(Math.log2(Math.floor(remaining / count)));
  const lowBytes = Math.ceil((count * low) / (8 * ALIGNMENT)) * ALIGNMENT;
  for (let i = 0; found < count && i < 8 * (bytes.length - lowBytes); i++) {
    if (!((bytes[lowBytes + Math.floor(i / 8)] >> (i & 7)) & 1)) continue;
    let position = (i - found) * 2 ** low;
    for (let bit = 0; bit < low; bit++) {
      const at = found * low + bit;
      position += ((bytes[Math.floor(at / 8)] >> (at & 7)) & 1) * 2 ** bit;
    }
    positions[found++] = position;
  }
  return positions;
}

function fromBfloat16(halves) {
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16;
  return new Float32Array(bits.buffer);
}

function fromFloat16(halves) {
  const floats = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const sign = halves[i] & 0x8000 ? -1 : 1;
    const exponent = (halves[i] >> 10) & 31;
    const fraction = halves[i] & 0x3ff;
    // Nested files hold no infinities and no NaN, which exponent 31 would be.
    floats[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }
  return floats;
}
