// Images: the picture in light grey under the signed map of its patches, which is painted pixel by pixel (image.py).
const loaded = new Map(); // address of a picture -> Image

function withPicture(sample, draw) {
  const image = loaded.get(sample.picture) ?? new Image();
  if (!loaded.has(sample.picture)) {
    loaded.set(sample.picture, image);
    image.src = sample.picture;
  }
  if (image.complete) draw(image);
  else image.addEventListener("load", () => draw(image), { once: true });
}

// The value between the middles of the patches, or that of the patch: `at` is a place in patches.
function valueAt(values, [rows, cols], x, y, smooth) {
  if (!smooth) return values[Math.min(rows - 1, Math.floor(y)) * cols + Math.min(cols - 1, Math.floor(x))];
  const clamp = (place, most) => Math.min(Math.max(place - 0.5, 0), most - 1);
  const a = clamp(x, cols), b = clamp(y, rows), i = Math.min(cols - 1, Math.floor(a)), j = Math.min(rows - 1, Math.floor(b));
  const right = Math.min(cols - 1, i + 1), below = Math.min(rows - 1, j + 1), h = a - i, v = b - j;
  const row = (line) => values[line * cols + i] * (1 - h) + values[line * cols + right] * h;
  return row(j) * (1 - v) + row(below) * v;
}

// values: of the patches, row by row; how: "patches", "smooth" or "picture".
function paintMap(canvas, sample, values, scale, width, how) {
  withPicture(sample, (image) => {
    const [rows, cols] = sample.grid, ratio = image.naturalHeight / image.naturalWidth || 1;
    const height = Math.max(1, Math.round(width * ratio));
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = image.naturalWidth > 64; // small pictures keep their pixels
    context.drawImage(image, 0, 0, width, height);
    if (how !== "picture") {
      const { strength, light, supports, opposes } = DATA.image;
      const pixels = context.getImageData(0, 0, width, height), data = pixels.data;
      for (let y = 0, at = 0; y < height; y++) {
        for (let x = 0; x < width; x++, at += 4) {
          const value = valueAt(values, sample.grid, (x + 0.5) / width * cols, (y + 0.5) / height * rows, how === "smooth") / scale;
          const alpha = Math.min(1, Math.abs(value)) * strength, colour = value < 0 ? opposes : supports;
          const grey = (0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]) * (1 - light) + 255 * light;
          for (let channel = 0; channel < 3; channel++) data[at + channel] = grey * (1 - alpha) + colour[channel] * alpha;
        }
      }
      context.putImageData(pixels, 0, 0);
    }
    if (sample.outline && view.outline) {
      const [text, wide, tall] = sample.outline, path = new Path2D(text);
      context.scale(width / wide, height / tall);
      const thin = width < 150 ? 0.5 : 1; // a line must not hide a small map
      for (const [colour, size] of [["#141414", 4 * thin], ["#fff", 1.6 * thin]]) {
        Object.assign(context, { strokeStyle: colour, lineWidth: size * wide / width, lineCap: "square" });
        context.stroke(path);
      }
    }
  });
}

// A value in [-1, 1] as it looks on a picture of middle grey, in both schemes.
function imageTint(value) {
  const { strength, supports, opposes } = DATA.image, alpha = Math.abs(value) * strength, colour = value < 0 ? opposes : supports;
  return `rgb(${colour.map((channel) => Math.round(channel * alpha + 205 * (1 - alpha))).join(",")})`;
}

const patchesOf = (values, cols) => values.filter((_, i) => !cols[i].special);

// The large map: pointing at it, or moving over it with the arrow keys, tells a patch's number.
function showImage(target, sample, cols, values, scale, place, grain, where) {
  const own = patchesOf(values, cols), patches = cols.filter((column) => !column.special), [rows, columns_] = sample.grid;
  const canvas = h("canvas", {}), cell = h("div", { class: "cell", hidden: true });
  const box = h("div", { class: "image", tabindex: "0", role: "region", "aria-label": `Map of ${rows} by ${columns_} patches; the arrow keys move from patch to patch` }, canvas, cell);
  paintMap(canvas, sample, own, scale, 360, view.how);
  let at = null;
  const point = (i) => {
    at = i;
    Object.assign(cell.style, { left: `${100 * (i % columns_) / columns_}%`, top: `${100 * Math.floor(i / columns_) / rows}%`, width: `${100 / columns_}%`, height: `${100 / rows}%` });
    cell.hidden = false;
    readout(where, { ...patches[i], text: `row ${Math.floor(i / columns_) + 1}, column ${i % columns_ + 1}` }, own[i], place, grain);
  };
  box.onpointermove = box.onclick = (event) => {
    const area = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - area.left) / area.width * columns_), y = Math.floor((event.clientY - area.top) / area.height * rows);
    if (x >= 0 && y >= 0 && x < columns_ && y < rows) point(y * columns_ + x);
  };
  box.onpointerleave = () => { cell.hidden = true; };
  box.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns_, ArrowDown: columns_ }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = at === null ? 0 : at + step;
    const sameRow = Math.abs(step) > 1 || at === null || Math.floor(next / columns_) === Math.floor(at / columns_);
    if (own[next] !== undefined && sameRow) point(next);
  };
  // The picture itself stands beside it where there is room.
  const picture = h("canvas", { role: "img", "aria-label": "the picture" });
  paintMap(picture, sample, own, scale, 360, "picture");
  target.replaceChildren(h("div", { class: "pictures" }, box, picture));
}

// A small map for each row (a block, a probe), in reading order; a click shows it large.
function showStrip(target, sample, cols, rows, { perRow, current, onPick, names, notes }) {
  const whole = Math.max(...rows.map((row) => wordScale(row, cols)));
  target.replaceChildren(h("div", { class: "strip" }, ...rows.map((row, i) => {
    const canvas = h("canvas", {});
    paintMap(canvas, sample, patchesOf(row, cols), perRow ? wordScale(row, cols) : whole, 96, view.how === "picture" ? "patches" : view.how);
    const button = h("button", { type: "button", "aria-pressed": String(i === current) }, canvas, h("span", {}, names[i]), notes ? h("small", {}, notes[i]) : null);
    button.onclick = () => onPick(i);
    return button;
  })));
}

// Each block's share of all |relevance|, in words.
function blockShares(rows) {
  const totals = rows.map((row) => row.reduce((sum, x) => sum + Math.abs(x), 0)), all = totals.reduce((sum, x) => sum + x, 0) || 1;
  return totals.map((total) => percent(total / all));
}

function compareImages(target, sample, cols, special) {
  const named = (name) => h("canvas", { role: "img", "aria-label": name });
  const picture = named("the picture");
  paintMap(picture, sample, [], 1, 220, "picture");
  target.classList.add("small");
  target.replaceChildren(h("div", {}, h("p", {}, h("b", {}, "the picture"), " ", sample.outline ? "the object outlined" : ""), picture),
    ...sample.explanations.map((row) => {
      const values = sums(unpack(row.scores, special), cols), canvas = named(`map of ${DATA.methods[row.method]}`);
      paintMap(canvas, sample, patchesOf(values, cols), wordScale(values, cols), 220, view.how === "picture" ? "patches" : view.how);
      return h("div", {}, h("p", {}, h("b", {}, DATA.methods[row.method]), " ", ...(row.gap === null ? [] : gap(row))), canvas);
    }));
}

function startImages() {
  for (const how of ["patches", "smooth", "picture"]) $(`how-${how}`).onclick = () => show({ how });
  $("outline").onclick = () => show({ outline: !view.outline });
  if (DATA.samples.some((sample) => sample.grid)) {
    $("f-text").placeholder = "Number of a sample";
    $("f-text").setAttribute("aria-label", "Number of a sample");
  }
}
