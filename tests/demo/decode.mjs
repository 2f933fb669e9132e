// Usage: node decode.mjs MODULE FILE_OR_URL. Prints every floating-point tensor of every level, as JSON lines.
import { readFileSync } from "node:fs";

const [module, place] = process.argv.slice(2);
const { NestedFile } = await import(module);

let file;
if (place.startsWith("http://")) {
  file = await NestedFile.open(place);
} else {
  const bytes = new Uint8Array(readFileSync(place));
  const end = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
  file = new NestedFile(place, bytes.subarray(8, end));
  await file.addBytes(bytes.subarray(end));
}
const base64 = (values) => Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString("base64");
for (let level = 1; level <= file.levels.length; level++) {
  const fetched = await file.fetchLevel(level);
  const tensors = {};
  for (const parameter of file.parameters.values()) {
    if (["F32", "F16", "BF16"].includes(parameter.dtype)) {
      tensors[parameter.name] = base64(file.sharedTensor(level, parameter.name));
    }
  }
  for (const name of file.levels[level - 1].private) {
    const { dtype } = file.tensors.get(`level${level}/private/${name}`);
    if (dtype === "F32") tensors[name] = base64(file.privateTensor(level, name));
  }
  console.log(JSON.stringify({ level, fetched, tensors }));
}
