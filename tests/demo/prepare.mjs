// Usage: node prepare.mjs MODULE FILE. The file holds one JSON line about pictures; prints their inputs as JSON lines.
import { readFileSync } from "node:fs";

const [module, path] = process.argv.slice(2);
const { prepare } = await import(module);
for (const { width, height, pixels, preprocessing } of JSON.parse(readFileSync(path, "utf8"))) {
  const data = new Uint8ClampedArray(Buffer.from(pixels, "base64"));
  const { pixels: seen, input } = prepare({ width, height, data }, preprocessing);
  console.log(
    JSON.stringify({
      pixels: Buffer.from(seen.data).toString("base64"),
      input: Buffer.from(input.buffer, input.byteOffset, input.byteLength).toString("base64"),
    }),
  );
}
