// The layers x tokens map as SVG: block 1 at the bottom beside the words, block L at the top.
function drawMap(target, cols, rows, { perRow, current, onHover, onPick }) {
  const room = Math.floor((target.clientWidth - 30 - 64) / cols.length);
  const cell = Math.max(19, Math.min(30, room)), tall = Math.max(9, Math.min(19, Math.round(260 / rows.length)));
  const left = 30, bars = 64, top = 4;
  const longest = cols.reduce((most, column) => Math.max(most, short(column.text).length), 1);
  const foot = Math.min(118, 16 + longest * 6.2);
  const width = cols.length * cell, height = rows.length * tall;
  const svg = s("svg", { width: left + width + bars, height: top + height + foot, role: "img",
    "aria-label": `${rows.length} blocks by ${cols.length} columns; the word table holds the numbers` });
  svg.append(s("rect", { class: "ground", x: left, y: top, width, height }));

  const limits = rows.map((row) => wordScale(row, cols));
  const whole = Math.max(...limits);
  const totals = rows.map((row) => row.reduce((sum, x) => sum + Math.abs(x), 0));
  const total = totals.reduce((sum, x) => sum + x, 0) || 1, most = Math.max(...totals) || 1;
  const y = (layer) => top + height - (layer + 1) * tall;
  rows.forEach((row, layer) => {
    row.forEach((value, i) => {
      const fill = tint(value / (perRow ? limits[layer] : whole), 0.95);
      if (fill !== "transparent") svg.append(s("rect", { x: left + i * cell, y: y(layer), width: cell - 1, height: tall - 1, style: `fill:${fill}` }));
    });
    svg.append(s("rect", { class: "share", x: left + width + 6, y: y(layer) + tall * 0.2, width: Math.max(1, totals[layer] / most * (bars - 8)), height: tall * 0.5 }));
    const step = Math.ceil(12 / tall);
    if (layer % step === 0 || layer === rows.length - 1 || layer === current) {
      svg.append(s("text", { x: left - 6, y: y(layer) + tall / 2 + 4, "text-anchor": "end", class: layer === current ? "on" : "" }, layer + 1));
    }
  });
  cols.forEach((column, i) => {
    const x = left + i * cell + cell / 2 + 4, base = top + height + 8;
    svg.append(s("text", { x, y: base, transform: `rotate(-60 ${x} ${base})`, "text-anchor": "end", opacity: column.special ? 0.6 : 1 }, short(column.text)));
  });
  if (current < rows.length) svg.append(s("rect", { class: "rule", x: left - 0.5, y: y(current) - 0.5, width, height: tall }));
  const cross = s("rect", { class: "cross", width: cell - 1, height: tall - 1, visibility: "hidden" });
  svg.append(cross);

  const find = (event) => {
    const box = svg.getBoundingClientRect();
    const i = Math.floor((event.clientX - box.left - left) / cell), layer = rows.length - 1 - Math.floor((event.clientY - box.top - top) / tall);
    return cols[i] && rows[layer] ? { i, layer } : null;
  };
  svg.addEventListener("pointermove", (event) => {
    const hit = find(event);
    cross.setAttribute("visibility", hit ? "visible" : "hidden");
    if (!hit) return;
    cross.setAttribute("x", left + hit.i * cell);
    cross.setAttribute("y", y(hit.layer));
    onHover(cols[hit.i], rows[hit.layer][hit.i], hit.layer, totals[hit.layer] / total);
  });
  svg.addEventListener("pointerleave", () => cross.setAttribute("visibility", "hidden"));
  svg.addEventListener("click", (event) => { const hit = find(event); if (hit) onPick(hit.layer); });
  target.replaceChildren(svg);
}

const short = (text) => ([...text].length > 16 ? [...text].slice(0, 15).join("") + "…" : text);

function s(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
