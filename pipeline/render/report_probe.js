// What the model looked at as it learnt: the same text at every probe of the training.
const probe = { sample: null, at: Infinity };

function showProbe(change = {}) {
  Object.assign(probe, change);
  const { sample } = probe, states = sample.states, at = Math.min(probe.at, states.length - 1), state = states[at];
  const cols = columns(sample, false), special = specials(sample);
  const rows = states.map((one) => sums(unpack(one.scores, special), cols));
  const scale = wordScale(rows[at], cols), place = `${probeName(states, at)}, step ${state.step}`;
  const right = (one) => ({ right: "✓ right", wrong: "✗ wrong" })[outcome({ ...one, label: sample.label })] ?? "";

  $("p-verdict").replaceChildren(h("b", {}, place), right(state) ? " · " : "", h("span", { class: right(state).slice(2) }, right(state)),
    ...(state.said !== undefined ? [" · ", state.said] : [" · predicted ", h("b", {}, className(state.prediction)), ` with probability ${finite(state.p) ? state.p.toFixed(3) : "–"}`,
    sample.label === null ? "" : ` · labelled ${className(sample.label)}`]));
  if (sample.grid) showImage($("p-text"), sample, cols, rows[at], scale, place, 0, $("p-readout"));
  else paint($("p-text"), cols, rows[at], scale, place, 0, $("p-readout"));
  $("p-readout").replaceChildren(`Point at a ${DATA.unit} or tap it for its number.`);
  legend($("p-legend"), scale, sample, isFlat(rows[at], cols));
  Object.assign($("p-epoch"), { max: states.length - 1, value: at });
  $("p-epoch").setAttribute("aria-valuetext", place);
  $("p-first").textContent = probeName(states, 0);
  $("p-last").textContent = probeName(states, states.length - 1);
  $("p-slider").hidden = states.length < 2;
  const kept = $("p-map").scrollLeft;
  const marks = states.map((one) => `${right(one).slice(0, 1)} ${className(one.prediction)} ${finite(one.p) ? one.p.toFixed(2) : ""}`);
  if (sample.grid) showStrip($("p-map"), sample, cols, rows, { perRow: true, current: at, onPick: (row) => showProbe({ at: row }),
    names: states.map((one, i) => probeName(states, i)), notes: marks });
  else drawMap($("p-map"), cols, rows, { perRow: true, current: at, down: true, rtl: isRtl($("p-text")),
    labels: states.map((one, i) => probeName(states, i).replace(/^\D+/, "")),
    marks,
    onHover: (column, value, row) => readout($("p-readout"), column, value, probeName(states, row)),
    onPick: (row) => showProbe({ at: row }) });
  $("p-map").scrollLeft = kept;
}

// Several probes within an epoch are told apart by their steps.
function probeName(states, i) {
  const twice = states.some((one, k) => k > 0 && one.epoch === states[k - 1].epoch);
  return twice ? `step ${states[i].step}` : `epoch ${states[i].epoch}`;
}

function startProbe() {
  const { samples } = DATA.probe;
  for (const sample of samples) sample.text = sampleText(sample);
  $("p-sample").append(...samples.map((sample, i) => h("option", { value: i }, `${sample.id}  ${sample.text.slice(0, 70)}`)));
  $("p-sample").oninput = (event) => showProbe({ sample: samples[event.target.value] });
  const go = (at) => showProbe({ at });
  $("p-epoch").oninput = (event) => { stop(); go(Number(event.target.value)); };
  $("p-play").onclick = () => play($("p-epoch"), go, 0);
  // Begin with a text that the model came to see differently.
  const turned = samples.findIndex(({ states }) => states[0].prediction !== states.at(-1).prediction);
  $("p-sample").value = Math.max(0, turned);
  $("learnt").hidden = false;
  showProbe({ sample: samples[Math.max(0, turned)] });
}
