// Rows x words as SVG: blocks, the first at the bottom beside the words; or, `down`, probes, the first at the top. To
// their right stands each row's share of all |relevance|, or what `marks` says.
function drawMap(target, cols, rows, { perRow, current, onHover, onPick, labels, marks, down = false, rtl = false }) {
  const totals = rows.map((row) => row.reduce((sum, x) => sum + Math.abs(x), 0));
  let size;
  [cols, rows, size] = fold(cols, rows);
  const bars = marks ? 16 + 6.2 * Math.max(...marks.map((mark) => mark.length)) : 64;
  const room = Math.floor((target.clientWidth - 34 - bars) / cols.length);
  const cell = Math.max(size > 1 ? 2 : 19, Math.min(30, room)), tall = Math.max(9, Math.min(19, Math.round(260 / rows.length)));
  const left = 34, top = 4;
  const longest = cols.reduce((most, column) => Math.max(most, short(column.text).length), 1);
  const foot = Math.min(118, 16 + longest * 6.2);
  const width = cols.length * cell, height = rows.length * tall;
  const svg = s("svg", { width: left + width + bars, height: top + height + foot, role: "img",
    "aria-label": `${rows.length} rows by ${cols.length} columns` });
  svg.append(s("rect", { class: "ground", x: left, y: top, width, height }));

  const limits = rows.map((row) => wordScale(row, cols));
  const whole = Math.max(...limits);
  const total = totals.reduce((sum, x) => sum + x, 0) || 1, most = Math.max(...totals) || 1;
  const x = (i) => left + (rtl ? cols.length - 1 - i : i) * cell; // in the order of the text above
  const y = (layer) => top + (down ? layer : rows.length - 1 - layer) * tall;
  rows.forEach((row, layer) => {
    row.forEach((value, i) => {
      const fill = tint(value / (perRow ? limits[layer] : whole), 0.95);
      if (fill !== "transparent") svg.append(s("rect", { x: x(i), y: y(layer), width: cell - 1, height: tall - 1, style: `fill:${fill}` }));
    });
    if (marks) svg.append(s("text", { x: left + width + 8, y: y(layer) + tall / 2 + 4, class: layer === current ? "on" : "" }, marks[layer]));
    else svg.append(s("rect", { class: "share", x: left + width + 6, y: y(layer) + tall * 0.2, width: Math.max(1, totals[layer] / most * (bars - 8)), height: tall * 0.5 }));
    const step = Math.ceil(12 / tall); // rows between two labels
    if (layer % step === 0 || layer === rows.length - 1 || layer === current) {
      svg.append(s("text", { x: left - 6, y: y(layer) + tall / 2 + 4, "text-anchor": "end", class: layer === current ? "on" : "" }, labels?.[layer] ?? layer + 1));
    }
  });
  const every = Math.ceil(19 / cell); // columns between two labels
  cols.forEach((column, i) => {
    if (i % every) return;
    const middle = x(i) + cell / 2 + 4, base = top + height + 8;
    svg.append(s("text", { x: middle, y: base, transform: `rotate(-60 ${middle} ${base})`, "text-anchor": "end", opacity: column.special ? 0.6 : 1 }, short(column.text)));
  });
  if (current < rows.length) svg.append(s("rect", { class: "rule", x: left - 0.5, y: y(current) - 0.5, width, height: tall }));
  const cross = s("rect", { class: "cross", width: cell - 1, height: tall - 1, visibility: "hidden" });
  svg.append(cross);

  const find = (event) => {
    const box = svg.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - left) / cell), line = Math.floor((event.clientY - box.top - top) / tall);
    const i = rtl ? cols.length - 1 - column : column, layer = down ? line : rows.length - 1 - line;
    return cols[i] && rows[layer] ? { i, layer } : null;
  };
  svg.addEventListener("pointermove", (event) => {
    const hit = find(event);
    cross.setAttribute("visibility", hit ? "visible" : "hidden");
    if (!hit) return;
    cross.setAttribute("x", x(hit.i));
    cross.setAttribute("y", y(hit.layer));
    onHover(cols[hit.i], rows[hit.layer][hit.i], hit.layer, totals[hit.layer] / total);
  });
  svg.addEventListener("pointerleave", () => cross.setAttribute("visibility", "hidden"));
  svg.addEventListener("click", (event) => { const hit = find(event); if (hit) onPick(hit.layer, hit.i * size); });
  target.replaceChildren(svg);
}

const short = (text) => ([...text].length > 16 ? [...text].slice(0, 15).join("") + "…" : text);

function s(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
