/**
 * A picture as the input of a network, prepared as the nested file says: resized, cropped and normalised.
 *
 * Browsers resize pictures each in its own way, so this is done here, as Pillow does it: with a filter that is as wide
 * as the reduction, first along rows, then along columns, with weights of 22 bits, rounded to 8 bits after each.
 */

const ONE = 2 ** 22;

const FILTERS = {
  nearest: undefined,
  box: { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  hamming: {
    support: 1,
    weight: (x) => (x === 0 ? 1 : Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x))),
  },
  bicubic: { support: 2, weight: (x) => cubic(Math.abs(x), -0.5) },
  lanczos: { support: 3, weight: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/**
 * Pixels of 8 bits: `data` holds `height` rows of `width` pixels of `channels` values.
 *
 * @typedef {{ width: number, height: number, channels: number, data: Uint8ClampedArray }} Pixels
 */

/**
 * Return a picture's pixels without their transparency, in grey for one channel.
 *
 * @param {{ width: number, height: number, data: Uint8ClampedArray }} picture red, green, blue and alpha.
 * @param {number} channels 1 or 3.
 * @returns {Pixels}
 */
export function opaque({ width, height, data }, channels) {
  const found = new Uint8ClampedArray(width * height * channels);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    const [red, green, blue] = [data[i], data[i + 1], data[i + 2]];
    if (channels === 1) {
      found[j++] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    } else {
      found[j++] = red;
      found[j++] = green;
      found[j++] = blue;
    }
  }
  return { width, height, channels, data: found };
}

/**
 * Resize pixels as Pillow does.
 *
 * @param {Pixels} pixels
 * @param {string} interpolation name of the filter; unknown ones are taken for bilinear.
 * @returns {Pixels}
 */
export function resize(pixels, width, height, interpolation) {
  const filter = interpolation in FILTERS ? FILTERS[interpolation] : FILTERS.bilinear;
  return transpose(resizeRows(transpose(resizeRows(pixels, width, filter)), height, filter));
}

/** Resize every row of pixels to a width; without a filter, the nearest pixel is taken. */
function resizeRows({ width, height, channels, data }, target, filter) {
  if (target === width) return { width, height, channels, data };
  const found = new Uint8ClampedArray(target * height * channels);
  const taps = filter ? filterTaps(width, target, filter) : nearestTaps(width, target);
  for (let y = 0, j = 0; y < height; y++) {
    for (const { begin, weights } of taps) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = ONE / 2;
        for (let k = 0, i = (y * width + begin) * channels + channel; k < weights.length; k++, i += channels) {
          sum += weights[k] * data[i];
        }
        found[j++] = Math.floor(sum / ONE); // clamped to [0, 255] by the array
      }
    }
  }
  return { width: target, height, channels, data: found };
}

/** Return for each resized pixel the first pixel that it is made of, and the weights of the pixels from there on. */
function filterTaps(width, target, { support, weight }) {
  const scale = width / target;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: target }, (_, x) => {
    const center = (x + 0.5) * scale;
    const begin = Math.max(0, Math.floor(center - support * stretch + 0.5));
    const end = Math.min(width, Math.floor(center + support * stretch + 0.5));
    const weights = [];
    for (let i = begin; i < end; i++) weights.push(weight((i - center + 0.5) / stretch));
    const total = weights.reduce((left, right) => left + right, 0);
    return { begin, weights: weights.map((each) => Math.sign(each) * Math.floor(Math.abs(each / total) * ONE + 0.5)) };
  });
}

/** Return the same for the nearest pixel; positions are summed up as Pillow does, which rounds some differently. */
function nearestTaps(width, target) {
  const scale = width / target;
  const taps = [];
  for (let x = 0, place = scale / 2; x < target; x++, place += scale) {
    taps.push({ begin: Math.min(width - 1, Math.floor(place)), weights: [ONE] });
  }
  return taps;
}

function transpose({ width, height, channels, data }) {
  const found = new Uint8ClampedArray(data.length);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < channels; channel++) found[(x * height + y) * channels + channel] = data[i++];
    }
  }
  return { width: height, height: width, channels, data: found };
}

/** Round half to even, as Python does. */
function round(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
}

/** Cut out the middle of pixels; what lies outside of them has the value `fill` of its channel. */
function cropCenter({ width, height, channels, data }, cropWidth, cropHeight, fill) {
  const found = new Uint8ClampedArray(cropWidth * cropHeight * channels);
  const start = (size, crop) => (size >= crop ? round((size - crop) / 2) : -Math.floor((crop - size) / 2));
  const [left, top] = [start(width, cropWidth), start(height, cropHeight)];
  for (let y = 0, j = 0; y < cropHeight; y++) {
    for (let x = 0; x < cropWidth; x++) {
      const [fromX, fromY] = [x + left, y + top];
      const inside = fromX >= 0 && fromY >= 0 && fromX < width && fromY < height;
      for (let channel = 0; channel < channels; channel++) {
        found[j++] = inside ? data[(fromY * width + fromX) * channels + channel] : fill[channel];
      }
    }
  }
  return { width: cropWidth, height: cropHeight, channels, data: found };
}

/** Return the size (width, height) to which timm resizes a picture before it is cropped. */
export function resizedSize(width, height, { input_size: [, inputHeight, inputWidth], crop_pct: share, crop_mode: mode }) {
  const [targetHeight, targetWidth] = [Math.floor(inputHeight / share), Math.floor(inputWidth / share)];
  if (mode === "squash") return [targetWidth, targetHeight];
  if (mode !== "border" && targetHeight === targetWidth) {
    // torchvision: the shorter edge gets the size, the longer one is rounded down.
    if (width <= height) return [targetWidth, Math.floor((targetWidth * height) / width)];
    return [Math.floor((targetHeight * width) / height), targetHeight];
  }
  const ratios = [height / targetHeight, width / targetWidth];
  const ratio = mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  return [round(width / ratio), round(height / ratio)];
}

/**
 * Return the input of a network for a picture.
 *
 * @param {{ width: number, height: number, data: Uint8ClampedArray }} picture red, green, blue and alpha.
 * @param {object} preprocessing that of the nested file's manifest.
 * @returns {{ pixels: Pixels, input: Float32Array }} what the network sees, and its input (channels, height, width).
 */
export function prepare(picture, preprocessing) {
  const [channels, height, width] = preprocessing.input_size;
  const mean = perChannel(preprocessing.mean, channels);
  const std = perChannel(preprocessing.std, channels);
  const fill = preprocessing.crop_mode === "border" ? mean.map((value) => round(255 * value)) : mean.map(() => 0);
  const size = resizedSize(picture.width, picture.height, preprocessing);
  const resized = resize(opaque(picture, channels), ...size, preprocessing.interpolation);
  const pixels = cropCenter(resized, width, height, fill);
  const input = new Float32Array(channels * height * width);
  for (let i = 0; i < pixels.data.length; i++) {
    const channel = i % channels;
    input[channel * height * width + (i - channel) / channels] = (pixels.data[i] / 255 - mean[channel]) / std[channel];
  }
  return { pixels, input };
}

/** Return one value per channel; a grey network uses the mean of the values for colours, as timm does. */
function perChannel(values, channels) {
  if (values.length === channels) return values;
  return Array(channels).fill(values.reduce((left, right) => left + right, 0) / values.length);
}
