// One sample on screen. `view` is all its state; every change goes through show().
const view = { sample: null, method: 0, layer: Infinity, pieces: false, perRow: true, how: "patches", outline: true };

function show(change = {}) {
  Object.assign(view, change);
  const { sample } = view;
  const chosen = sample.explanations.find((row) => row.method === view.method) ?? sample.explanations[0];
  const cols = columns(sample, view.pieces), special = specials(sample);
  const layers = chosen?.layers?.map((packed) => sums(unpack(packed, special), cols)) ?? null;
  const final = chosen ? sums(unpack(chosen.scores, special), cols) : cols.map(() => 0);
  const count = layers ? layers.length : 0;
  const layer = layers ? Math.min(view.layer, count + 1) : 1;
  const atEnd = !layers || layer === count + 1;
  const values = atEnd ? final : layers[layer - 1];
  const whole = layers ? Math.max(...layers.map((row) => wordScale(row, cols))) : 1;
  const scale = atEnd || view.perRow ? wordScale(values, cols) : whole;
  const place = atEnd ? "the decision" : `block ${layer} of ${count}`;

  verdict(sample);
  $("v-methods").replaceChildren(...sample.explanations.map((row) => toggle(DATA.methods[row.method], row === chosen, () => show({ method: row.method }))));
  // Of a block, only the steps of its int8 levels are known.
  const grain = atEnd ? 0 : chosen.layers[layer - 1][1] / 127;
  if (sample.grid) showImage($("v-text"), sample, cols, values, scale, place, grain, $("v-readout"));
  else paint($("v-text"), cols, values, scale, place, grain);
  $("v-readout").replaceChildren(chosen ? `Point at a ${DATA.unit} or tap it for its number.` : "This sample has no explanation.");
  legend($("v-legend"), scale, sample, isFlat(values, cols));
  $("v-gap").replaceChildren(...(chosen ? gap(chosen) : []));
  $("v-metrics").textContent = chosen ? metricLine(chosen) : "";

  $("v-layers").hidden = !layers;
  $("v-nolayers").textContent = layers || !chosen ? "" : DATA.layerMethods.includes(DATA.methods[chosen.method])
    ? "This method has no layer map for this sample." : DATA.layerMethods.length
    ? `Layer maps on this page: ${DATA.layerMethods.join(", ")}.` : "This page holds no layer maps.";
  if (layers) {
    Object.assign($("layer"), { max: count + 1, value: layer });
    $("layer").setAttribute("aria-valuetext", place);
    $("layer-out").textContent = `showing ${place}`;
    press("scale-row", view.perRow);
    press("scale-map", !view.perRow);
    const kept = $("v-map").scrollLeft;
    if (sample.grid) showStrip($("v-map"), sample, cols, [...layers, final], { perRow: view.perRow, current: layer - 1, onPick: (row) => show({ layer: row + 1 }),
      names: [...layers.map((_, i) => `block ${i + 1}`), "decision"], notes: [...blockShares(layers), ""] });
    else drawMap($("v-map"), cols, layers, { perRow: view.perRow, current: layer - 1, rtl: isRtl($("v-text")),
      onHover: (column, value, row, share) => readout($("v-readout"), column, value, `block ${row + 1}, which holds ${percent(share)} of all |relevance|`, chosen.layers[row][1] / 127),
      onPick: (row, column) => { show({ layer: row + 1 }); bringUp($("v-text"), column); } });
    $("v-map").scrollLeft = kept;
  }
  $("v-curves").hidden = !chosen?.curves.none;
  if (chosen?.curves.none) drawCurves($("v-curves-panels"), chosen, sample.random);
  if (sample.grid) compareImages($("v-compare"), sample, cols, special);
  else compare(sample, cols, special);
  if ($("d-table").open) wordTable(sample, cols, special, atEnd ? null : values, place, grain);
  press("unit-word", !view.pieces);
  press("unit-piece", view.pieces);
  $("units").hidden = !!sample.grid;
  $("hows").hidden = !sample.grid;
  for (const how of ["patches", "smooth", "picture"]) press(`how-${how}`, view.how === how);
  press("outline", view.outline);
  $("outline").hidden = !sample.outline;
  document.querySelectorAll(".unit-name").forEach((node) => { node.textContent = view.pieces ? "piece" : DATA.unit; });
}

function verdict(sample) {
  const result = outcome(sample);
  $("v-title").textContent = `Sample ${sample.id}`;
  const mark = result ? h("span", { class: result }, result === "right" ? "✓ right" : "✗ wrong") : "";
  if (sample.said !== undefined) return $("v-verdict").replaceChildren(mark, result ? " · " : "", sample.said);
  $("v-verdict").replaceChildren(
    mark,
    result ? " · predicted " : "Predicted ", h("b", {}, className(sample.prediction)), ` with probability ${finite(sample.p) ? sample.p.toFixed(3) : "–"}`,
    sample.label === null ? "" : ` · labelled ${className(sample.label)}`);
}

function paint(target, cols, values, scale, place, grain = 0, where = $("v-readout")) {
  target.replaceChildren();
  const pair = cols.findIndex((column) => column.second);
  target.classList.toggle("long", cols.length > LONG);
  cols.forEach((column, i) => {
    if (pair >= 0 && (i === 0 || i === pair)) target.append(h("span", { class: "segment", dir: "auto" }, DATA.segments[Number(i === pair)]));
    if (column.space) target.append(" ");
    const kind = (column.special ? "special" : "word") + (column.marked ? " marked" : "") + (column.piece ? " piece" : "");
    const node = h("span", { class: kind, dir: column.special ? "ltr" : null, title: signed(values[i], grain), style: { backgroundColor: column.special ? "" : tint(values[i] / scale) } }, column.text);
    node.onpointerenter = node.onclick = () => readout(where, column, values[i], place, grain);
    target.append(node);
  });
}

// In a long text, bring a word into view, but leave the page where it is.
function bringUp(target, i) {
  const node = target.children[i];
  if (node) target.scrollTop = node.offsetTop - target.clientHeight / 3;
}

function readout(where, column, value, place, grain = 0) {
  where.replaceChildren(h("b", {}, column.text), ` ${signed(value, grain)} at ${place}`,
    column.names.length > 1 ? ` · sum of ${column.names.join(" ")}` : "", column.marked ? " · marked by a human" : "", column.special ? " · special token, not on the colour scale" : "");
}

const isRtl = (node) => getComputedStyle(node).direction === "rtl";
const isFlat = (values, cols) => values.every((value, i) => cols[i].special || !value);

function legend(target, scale, sample, flat) {
  if (flat) return target.replaceChildren(`no ${DATA.unit} has any relevance here`);
  const stops = [-4, -3, -2, -1, 0, 1, 2, 3, 4].map((step) => (sample.grid ? imageTint : tint)(step / 4)).join(",");
  target.replaceChildren(`opposes −${plain(scale)}`, h("i", { style: { background: `linear-gradient(to right,${stops})` } }), `+${plain(scale)} supports`,
    sample.units.some(([, flags]) => flags & MARKED) ? h("span", {}, " · ", h("u", {}, "human rationale")) : "");
}

function gap(row) {
  return [h("span", { title: "How far the scores are from adding up to the change of the output, relative, at the worst block" }, `completeness gap ${row.gap === null ? "not defined" : percent(row.gap)}`),
    row.converged ? "" : " ", row.converged ? "" : h("strong", { class: "flag" }, "not converged")];
}

function metricLine(row) {
  return Object.entries(row.metrics).map(([name, value]) => {
    const [label, variant, arrow] = DATA.metrics[name];
    return `${label}${variant ? ` (${variant})` : ""} ${finite(value) ? value.toFixed(3).replace("-", "−") : "–"} ${arrow}`;
  }).join("  ·  ");
}

function compare(sample, cols, special) {
  if (compare.shown?.[0] === sample && compare.shown[1] === view.pieces) return; // long texts take a moment
  compare.shown = [sample, view.pieces];
  $("d-compare").hidden = sample.explanations.length < 2;
  $("v-compare").replaceChildren(...sample.explanations.map((row) => {
    const values = sums(unpack(row.scores, special), cols);
    const text = h("div", { class: "text", dir: "auto" });
    paint(text, cols, values, wordScale(values, cols), `the decision (${DATA.methods[row.method]})`);
    return h("div", {}, h("p", {}, h("b", {}, DATA.methods[row.method]), ...gap(row)), text);
  }));
}

function wordTable(sample, cols, special, layerValues, place, grain) {
  const scores = sample.explanations.map((row) => sums(unpack(row.scores, special), cols));
  const scales = scores.map((values) => wordScale(values, cols));
  const head = [view.pieces ? "piece" : DATA.unit, ...sample.explanations.map((row) => DATA.methods[row.method])];
  if (layerValues) head.push(place);
  $("v-table").replaceChildren(h("table", {},
    h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, ...cols.map((column, i) => h("tr", {},
      h("th", { scope: "row", class: column.marked ? "marked" : null, dir: "auto" }, column.text),
      ...scores.map((values, k) => h("td", { style: { backgroundColor: column.special ? "" : tint(values[i] / scales[k]) } }, signed(values[i]))),
      layerValues ? h("td", {}, signed(layerValues[i], grain)) : null)))));
}

function toggle(text, pressed, onclick) {
  const node = h("button", { type: "button", "aria-pressed": String(pressed) }, text);
  node.onclick = onclick;
  return node;
}

// Move a slider by itself from its start to its end; any other move stops it.
let timer = null;
const stop = () => clearInterval(timer);
function play(slider, go, from) {
  stop();
  go(from);
  timer = setInterval(() => {
    go(Number(slider.value) + 1);
    if (slider.value === slider.max) stop();
  }, 450);
}

const press = (id, on) => $(id).setAttribute("aria-pressed", String(on));
