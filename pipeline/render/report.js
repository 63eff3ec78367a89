// The list: filters, order, keys and the address; starts the page.
let listed = [];

const primaryGap = (sample) => sample.explanations[0]?.gap ?? -1;
const primaryMetric = (sample, name) => sample.explanations[0]?.metrics[name] ?? -Infinity;

function orders(kind) {
  if (kind.startsWith("metric:")) return (a, b) => primaryMetric(b, kind.slice(7)) - primaryMetric(a, kind.slice(7));
  return { "p-": (a, b) => b.p - a.p, "p+": (a, b) => a.p - b.p, "gap-": (a, b) => primaryGap(b) - primaryGap(a) }[kind] ?? ((a, b) => a.id - b.id);
}

function refresh() {
  const text = $("f-text").value.trim().toLowerCase(), want = $("f-outcome").value, wanted = $("f-class").value;
  listed = DATA.samples.filter((sample) =>
    (!text || sample.text.toLowerCase().includes(text) || String(sample.id) === text) &&
    (!want || (want === "flagged" ? sample.explanations.some((row) => !row.converged) : outcome(sample) === want)) &&
    (!wanted || String(sample.label ?? sample.prediction) === wanted)).sort(orders($("f-sort").value));
  $("count").textContent = !listed.length ? "No sample matches these filters." : listed.length === DATA.samples.length ? `${listed.length} samples` : `${listed.length} of ${DATA.samples.length} samples`;
  $("rows").replaceChildren(...listed.map((sample) => {
    const result = outcome(sample);
    const pictured = sample.grid && sample.picture;
    const button = h("button", { type: "button", "data-id": sample.key, class: pictured ? "pictured" : null },
      pictured ? h("img", { src: sample.picture, alt: "" }) : null,
      h("span", { class: result }, result === "right" ? "✓" : result === "wrong" ? "✗" : "·", h("span", { class: "sr" }, result)),
      h("span", {}, className(sample.prediction)), h("span", { class: "p" }, finite(sample.p) ? sample.p.toFixed(2) : "–"),
      h("span", { dir: "auto" }, `${sample.id}  ${sample.text.slice(0, 90)}`));
    button.onclick = () => open(sample);
    return h("li", {}, button);
  }));
  if (listed.length && !listed.includes(view.sample)) open(listed[0]);
  else mark();
}

function open(sample, remember = true) {
  show({ sample });
  if (remember) try { history.replaceState(null, "", `#sample-${sample.key}`); } catch { /* some viewers forbid it */ }
  mark();
}

function mark() {
  const place = listed.indexOf(view.sample);
  $("v-place").textContent = place < 0 ? `not among ${listed.length}` : `${place + 1} of ${listed.length}`;
  $("prev").disabled = place <= 0;
  $("next").disabled = place >= listed.length - 1;
  for (const button of $("rows").querySelectorAll("button")) {
    const here = button.dataset.id === view.sample?.key;
    button.toggleAttribute("aria-current", here);
    if (here) keepInSight(button);
  }
}

// Scrolls the list alone: scrollIntoView would also move the page.
function keepInSight(button) {
  const list = $("rows"), box = list.getBoundingClientRect(), own = button.getBoundingClientRect();
  if (own.top < box.top) list.scrollTop -= box.top - own.top;
  if (own.bottom > box.bottom) list.scrollTop += own.bottom - box.bottom;
}

function step(by) {
  const next = listed[listed.indexOf(view.sample) + by];
  if (next) open(next);
}

function addOptions() {
  const classes = [...new Set(DATA.samples.map((sample) => sample.label ?? sample.prediction))].sort((a, b) => a - b);
  $("f-class").append(...classes.map((index) => h("option", { value: index }, className(index))));
  $("f-sort").append(...Object.entries(DATA.metrics).map(([name, [label, variant]]) =>
    h("option", { value: `metric:${name}` }, `highest ${label}${variant ? ` (${variant})` : ""} first`)));
}

function start() {
  startImages();
  for (const sample of DATA.samples) sample.text = sampleText(sample);
  addOptions();
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", refresh);
  $("prev").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  // At its end stands the decision, of whatever method or sample comes next.
  const toLayer = (layer) => show({ layer: layer >= Number($("layer").max) ? Infinity : layer });
  $("play").onclick = () => play($("layer"), toLayer, 1);
  $("layer").oninput = (event) => { stop(); toLayer(Number(event.target.value)); };
  $("scale-row").onclick = () => show({ perRow: true });
  $("scale-map").onclick = () => show({ perRow: false });
  $("unit-word").onclick = () => show({ pieces: false });
  $("unit-piece").onclick = () => show({ pieces: true });
  $("d-table").addEventListener("toggle", () => show());
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.("input, select, textarea, [role=region]")) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      step(event.key === "ArrowLeft" ? -1 : 1);
    }
  });
  const fromAddress = () => DATA.samples.find((sample) => `#sample-${sample.key}` === location.hash);
  window.addEventListener("hashchange", () => { const sample = fromAddress(); if (sample) open(sample, false); });
  $("browser").hidden = false;
  $("static").hidden = true;
  const asked = fromAddress();
  view.sample = asked ?? DATA.samples.toSorted?.(orders("id"))[0] ?? DATA.samples[0];
  refresh();
  open(view.sample, false);
  if (asked) window.scrollTo(0, $("samples").getBoundingClientRect().top + window.scrollY); // scrollIntoView would move an embedding page too
}

if (DATA.samples.length) start();
if (DATA.probe.samples.length) startProbe();
