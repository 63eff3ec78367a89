// Flow from token to token: other blocks and samples, and what flows into and out of the token that is looked at.
function startFlow(block) {
  const { geometry, strongest, samples } = JSON.parse($("flow-data").textContent);
  const figures = [...block.querySelectorAll("figure")];
  const state = { sample: 0, layer: samples[0].layers.length - 1, side: null, token: 0 };

  // (source, target) shares of a block: a scale, then int8 levels row by row (flow.py).
  const unpackBlock = (text) => {
    const [scale, levels] = text.split(" ");
    const bytes = atob(levels);
    return (i) => ((bytes.charCodeAt(i) << 24) >> 24) / 127 * scale;
  };

  function lines(share, count) {
    const every = [];
    for (let target = 0; target < count; target++) {
      let column = Array.from({ length: count }, (_, source) => ({ source, target, value: share(source * count + target) }));
      if (state.side === null) column = column.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, strongest);
      every.push(...column);
    }
    return every.filter((line) => Math.abs(line.value) >= 0.01 && (state.side === null || line[state.side] === state.token))
      .sort((a, b) => Math.abs(a.value) - Math.abs(b.value));
  }

  function draw() {
    const sample = samples[state.sample], figure = figures[state.sample], count = sample.tokens.length;
    figures.forEach((other) => { other.hidden = other !== figure; });
    const shown = lines(unpackBlock(sample.shares[state.layer]), count);
    const { left, right, top, row } = geometry, middle = (left + right) / 2;
    figure.querySelector(".lines").replaceChildren(...shown.map(({ source, target, value }) => {
      const a = top + row * source, b = top + row * target, size = Math.abs(value);
      return s("path", { class: value > 0 ? "plus" : "minus", d: `M${left} ${a}C${middle} ${a} ${middle} ${b} ${right} ${b}`,
        "stroke-width": (0.5 + 5 * size).toFixed(1), opacity: Math.min(1, 0.12 + 1.4 * size).toFixed(2) });
    }));
    const other = { source: "target", target: "source" }[state.side];
    const reached = new Map(shown.map((line) => [line[other], line.value]));
    for (const text of figure.querySelectorAll("text[data-i]")) {
      const mine = text.classList.contains(state.side ?? "none"), i = Number(text.dataset.i);
      text.classList.toggle("on", mine ? i === state.token : state.side !== null && reached.has(i));
    }
    const place = `block ${sample.layers[state.layer] + 1}`;
    $("flow-out").textContent = `${place} of ${sample.layers[sample.layers.length - 1] + 1}`;
    $("flow-readout").replaceChildren(...(state.side === null ? ["Point at a token to see what flows into it (right) or out of it (left)."] : [
      h("b", {}, sample.tokens[state.token]), state.side === "target" ? " is made, in " : " goes, in ", place, state.side === "target" ? ", from " : ", to ",
      shown.slice(-8).reverse().map((line) => `${sample.tokens[line[other]]} ${line.value < 0 ? "−" : ""}${Math.round(100 * Math.abs(line.value))} %`).join(" · ") || "nothing above 1 %"]));
  }

  const look = (side, token) => { Object.assign(state, { side, token }); draw(); };
  $("flow-layer").oninput = (event) => { state.layer = Number(event.target.value) - 1; draw(); };
  $("flow-sample").onchange = (event) => {
    Object.assign(state, { sample: Number(event.target.value), side: null });
    const count = samples[state.sample].layers.length;
    state.layer = Math.min(state.layer, count - 1);
    $("flow-layer").max = count;
    draw();
  };
  for (const figure of figures) {
    for (const text of figure.querySelectorAll("text[data-i]")) {
      const side = text.classList.contains("source") ? "source" : "target", token = Number(text.dataset.i);
      text.setAttribute("tabindex", 0);
      text.onpointerenter = text.onclick = text.onfocus = () => look(side, token);
    }
    figure.querySelector("svg").onpointerleave = () => look(null, 0);
  }
  $("flow-sample").append(...figures.map((figure, i) => h("option", { value: i }, figure.querySelector("figcaption").textContent)));
  $("flow-layer").max = samples[0].layers.length;
  $("flow-layer").value = samples[0].layers.length;
  $("flow-controls").hidden = false;
  block.classList.add("live");
  draw();
}

if ($("flow-data")) startFlow($("flow-pictures"));
