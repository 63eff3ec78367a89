// The page's data and what is computed from it. Nothing here touches the document but the data block itself.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SPECIAL = 1, SPACE = 2, MARKED = 4, SECOND = 8;

const finite = (x) => typeof x === "number" && Number.isFinite(x);
// What is known to within a step only is shown with no more digits than that.
const signed = (x, step = 0) => (!finite(x) ? "–" : (x < 0 ? "−" : "+") + (step ? Math.abs(x).toFixed(Math.min(9, Math.max(0, Math.ceil(-Math.log10(step))))) : plain(Math.abs(x))));
const plain = (x) => (!finite(x) ? "–" : x === 0 ? "0" : x >= 0.001 && x < 1e5 ? String(+x.toPrecision(3)) : x.toExponential(1));
const percent = (x) => (finite(x) ? (100 * x).toFixed(Math.abs(x) < 0.1 ? 2 : 1) + " %" : "–");
const className = (i) => DATA.labels[i] ?? "class " + i;
const maxAbs = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;

// A value in [-1, 1] as a translucent tint; the hues are set in report.css, for light and for dark paper.
function tint(value, strength = DATA.strength) {
  const size = Math.min(1, Math.abs(value)) * strength;
  return size < 0.004 ? "transparent" : `rgba(var(${value < 0 ? "--opposes" : "--supports"}),${size.toFixed(3)})`;
}

// int16 or int8 levels with one scale for words and one for special tokens (packing.py).
function unpack(packed, special) {
  const [text, scale, specialScale] = packed;
  const bytes = atob(text), wide = bytes.length === 2 * special.length;
  const level = (i) => (wide ? ((bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8)) << 16) >> 16 : (bytes.charCodeAt(i) << 24) >> 24);
  return special.map((flag, i) => level(i) / (wide ? 32767 : 127) * (flag ? specialScale : scale));
}

// Columns of a sample: its words, or the pieces of the tokenizer; `at` are the positions whose scores are summed.
function columns(sample, pieces) {
  const result = [];
  let position = 0;
  for (const [text, flags, parts] of sample.units) {
    const names = parts ?? [text];
    const start = position;
    position += names.length;
    const base = { special: !!(flags & SPECIAL), marked: !!(flags & MARKED), second: !!(flags & SECOND) };
    if (!pieces || !parts) {
      result.push({ ...base, text, space: !!(flags & SPACE), at: names.map((_, i) => start + i), names });
    } else {
      names.forEach((name, i) => result.push({ ...base, text: name, space: i === 0 && !!(flags & SPACE), at: [start + i], names: [name], piece: true }));
    }
  }
  return result;
}

const specials = (sample) => columns(sample, true).map((column) => column.special);
const sums = (scores, cols) => cols.map((column) => column.at.reduce((sum, i) => sum + scores[i], 0));
const wordScale = (values, cols) => maxAbs(values.filter((_, i) => !cols[i].special));

// A long text scrolls in a box of its own, and its map puts neighbouring words together.
const LONG = 240;

// Columns, rows of values, and how many columns stand in one: at most LONG are left. Special tokens count in none.
function fold(cols, rows) {
  const size = Math.ceil(cols.length / LONG);
  if (size < 2) return [cols, rows, 1];
  const starts = Array.from({ length: Math.ceil(cols.length / size) }, (_, k) => k * size);
  const groups = starts.map((start) => {
    const words = cols.slice(start, start + size).filter((column) => !column.special);
    const text = words.length > 1 ? `${words[0].text} … ${words.at(-1).text}` : words[0]?.text ?? cols[start].text;
    return { text, names: [], special: !words.length, marked: words.some((column) => column.marked), at: [] };
  });
  const sum = (row, start) => row.slice(start, start + size).reduce((total, x, i) => total + (cols[start + i].special ? 0 : x), 0);
  return [groups, rows.map((row) => starts.map((start) => sum(row, start))), size];
}

// Of one class the label tells, of several labels all of them; a number is neither right nor wrong.
function outcome(sample) {
  if (sample.said !== undefined) return sample.right === null ? "" : sample.right ? "right" : "wrong";
  return sample.label === null ? "" : sample.label === sample.prediction ? "right" : "wrong";
}

const sampleText = (sample) => sample.grid ? "" : sample.units.filter(([, flags]) => !(flags & SPECIAL))
  .map(([text, flags]) => (flags & SPACE ? " " : "") + text).join("").trim();

// h("p", { class: "note" }, "text", child): every text goes in as a text node, never as markup.
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const $ = (id) => document.getElementById(id);
