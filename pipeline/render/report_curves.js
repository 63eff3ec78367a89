// Perturbation curves of one sample: the probability of the explained class as ranked words are removed, or kept alone.
function drawCurves(target, row, random) {
  const kinds = [["removed", `Most relevant ${DATA.units} removed`], ["kept", `Only the most relevant ${DATA.units} kept`]];
  target.replaceChildren(...kinds.map(([kind, title]) => {
    const lines = [[DATA.methods[row.method], row.curves.none?.[kind]], ["random", random?.[kind]], ["reversed", row.curves.reversed?.[kind]]];
    return curve(title, lines.map(([name, points], i) => ({ name, points, style: `s${i}` })).filter((line) => line.points));
  }).filter(Boolean));
}

function curve(title, lines) {
  if (!lines.length) return null;
  const width = 320, height = 148, left = 30, right = 8, top = 8, bottom = 20;
  const most = Math.max(...lines.flatMap((line) => line.points.map(([q]) => q)));
  const x = (q) => left + (q / most) * (width - left - right), y = (p) => height - bottom - p * (height - top - bottom);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${lines.map((line) => `${line.name} ends at ${percent(line.points.at(-1)[1])}`).join(", ")}` });
  for (const tick of [0, 0.5, 1]) {
    svg.append(s("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }), s("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, tick));
  }
  svg.append(s("text", { x: left, y: height - 5 }, `0 % of the ${DATA.units}`), s("text", { x: width - right, y: height - 5, "text-anchor": "end" }, `${+(100 * most).toFixed(1)} %`));
  for (const line of lines.toReversed?.() ?? lines) {
    const points = line.points.filter(([, p]) => finite(p));
    svg.append(s("polyline", { class: line.style, points: points.map(([q, p]) => `${x(q).toFixed(1)},${y(p).toFixed(1)}`).join(" ") }));
    for (const [q, p] of points) {
      const dot = s("circle", { class: line.style, cx: x(q).toFixed(1), cy: y(p).toFixed(1), r: 2.4 });
      dot.append(s("title", {}, `${line.name}: probability ${p.toFixed(4)} at ${+(100 * q).toFixed(1)} %`));
      svg.append(dot);
    }
  }
  return h("figure", {}, h("figcaption", {}, h("b", {}, title), ...lines.map((line) => {
    const key = s("svg", { viewBox: "0 0 16 6", "aria-hidden": "true" });
    key.append(s("line", { class: line.style, x1: 0, x2: 16, y1: 3, y2: 3 }));
    return h("span", { class: "key" }, key, `${line.name} `, h("i", {}, line.points.at(-1)[1].toFixed(3)));
  })), svg);
}
