"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
// Of Okabe and Ito 2008 what has a contrast of 3:1 on the page; the others darkened, or black.
const COLOURS = ["#0072B2", "#D55E00", "#1B1B1B", "#009E73", "#BE5C98", "#6E5600"];
const WORDS = {
  model: "Model", scene: "Scene", change: "Change",
  mrae: "MRAE", rmse: "RMSE", psnr: "PSNR, dB", sam: "SAM, degrees", ssim: "SSIM", ergas: "ERGAS, %",
  mrae_full: "MRAE, whole frame", sam_full: "SAM, whole frame",
};
const show = (value) => (typeof value === "number" ? Number(value.toPrecision(4)).toString() : String(value ?? ""));

// --- tables

function fill(table, head, rows, sortable) {
  let order = null;
  const draw = () => {
    table.replaceChildren();
    const top = table.createTHead().insertRow();
    head.forEach((name, column) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      if (sortable) {
        const button = document.createElement("button");
        button.textContent = WORDS[name] || name;
        button.onclick = () => {
          order = order && order.column === column ? { column, up: !order.up } : { column, up: true };
          const sign = order.up ? 1 : -1;
          rows.sort((a, b) => sign * (a[column] > b[column] ? 1 : a[column] < b[column] ? -1 : 0));
          draw();
          table.querySelectorAll("th button")[column].focus(); // the button that was pressed is gone
        };
        if (order && order.column === column) cell.ariaSort = order.up ? "ascending" : "descending";
        cell.append(button);
      } else cell.textContent = WORDS[name] || name;
      top.append(cell);
    });
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const value of row) line.insertCell().textContent = show(value);
    }
  };
  draw();
}

// --- curves on a canvas

function ticks(low, high, count) { // round values of an axis, and how many decimals tell them apart
  const least = (high - low) / count, power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= least * 0.999) * power, places = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + 1e-6 * step; i++) places.push(i * step);
  return { places, decimals: Math.max(0, -Math.floor(Math.log10(step) + 1e-6)) };
}

function plot(canvas, series, { x = "", y = "", zero = true, diagonal = false } = {}) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth || 600, height = Math.min(360, Math.max(220, width * 0.42));
  canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio); pen.font = "12px system-ui, sans-serif"; pen.fillStyle = "#1b1b1b";
  const xs = series.flatMap((s) => s.x), ys = series.flatMap((s) => s.band ? [...s.y, ...s.band] : s.y).filter(Number.isFinite);
  let [left, right] = [Math.min(...xs), Math.max(...xs)], low = zero ? Math.min(0, ...ys) : Math.min(...ys), high = Math.max(...ys);
  if (right === left) right = left + 1;
  if (high === low) high = low + 1;
  const box = { l: 66, r: width - 12, t: 10, b: height - 34 };
  const px = (v) => box.l + ((v - left) / (right - left)) * (box.r - box.l), py = (v) => box.b - ((v - low) / (high - low)) * (box.b - box.t);
  pen.strokeStyle = "#dddddd"; pen.textAlign = "right"; pen.textBaseline = "middle";
  const rows = ticks(low, high, 5), columns = ticks(left, right, width < 500 ? 4 : 7);
  for (const v of rows.places) {
    pen.beginPath(); pen.moveTo(box.l, py(v)); pen.lineTo(box.r, py(v)); pen.stroke();
    pen.fillText(v.toFixed(rows.decimals), box.l - 6, py(v));
  }
  pen.textAlign = "center"; pen.textBaseline = "top";
  for (const v of columns.places) pen.fillText(v.toFixed(columns.decimals), px(v), box.b + 5);
  pen.fillText(x, (box.l + box.r) / 2, box.b + 20);
  pen.save(); pen.translate(8, (box.t + box.b) / 2); pen.rotate(-Math.PI / 2); pen.fillText(y, 0, -6); pen.restore();
  if (diagonal) { pen.setLineDash([5, 4]); pen.strokeStyle = "#888888"; pen.beginPath(); pen.moveTo(px(left), py(left)); pen.lineTo(px(right), py(right)); pen.stroke(); pen.setLineDash([]); }
  series.forEach((s, index) => {
    const colour = s.colour || COLOURS[index % COLOURS.length];
    if (s.band) {
      pen.globalAlpha = 0.15; pen.fillStyle = colour; pen.beginPath();
      s.x.forEach((v, i) => pen.lineTo(px(v), py(s.y[i] + s.spread[i])));
      [...s.x].reverse().forEach((v, i) => { const j = s.x.length - 1 - i; pen.lineTo(px(v), py(s.y[j] - s.spread[j])); });
      pen.fill(); pen.globalAlpha = 1;
    }
    pen.strokeStyle = colour; pen.lineWidth = 2; pen.setLineDash(s.dashed ? [6, 4] : []); pen.beginPath();
    s.x.forEach((v, i) => pen.lineTo(px(v), py(s.y[i])));
    pen.stroke(); pen.setLineDash([]); pen.lineWidth = 1;
  });
}

function legend(target, series) {
  target.replaceChildren(...series.map((s, index) => {
    const item = document.createElement("span"), line = document.createElement("i");
    line.style.borderTop = `3px ${s.dashed ? "dashed" : "solid"} ${s.colour || COLOURS[index % COLOURS.length]}`;
    item.append(line, s.name);
    return item;
  }));
}

// --- a scene

const state = { model: 0, scene: 0, band: 0, points: [[0.5, 0.5]], cubes: null };

async function unpack(text, bands) { // base64 of deflated uint16 differences between bands -> steps
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const steps = new Uint16Array(await new Response(stream).arrayBuffer());
  const pixels = steps.length / bands;
  for (let i = pixels; i < steps.length; i++) steps[i] += steps[i - pixels];
  return steps;
}

async function openScene() {
  const model = data.models[state.model], scene = model.shown[state.scene];
  document.querySelectorAll(".picture").forEach((box) => box.style.setProperty("--shape", scene.width / scene.height));
  byId("photo").src = scene.photo; byId("rendered").src = scene.rendered;
  byId("errors").hidden = !scene.error;
  if (scene.error) byId("error").src = scene.error;
  byId("errorscale").textContent = `relative error, dark 0 to bright ${show(scene.error_top)} and above`;
  const cubes = {};
  state.cubes = null; // nothing is drawn of the scene before while this one is unpacked
  for (const kind of ["measured", "predicted", "scale"]) if (scene[kind]) cubes[kind] = await unpack(scene[kind], model.wavelengths.length);
  if (scene !== data.models[state.model].shown[state.scene]) return; // another was chosen meanwhile
  state.cubes = cubes;
  drawBand(); drawSpectra();
}

function value(kind, band, row, column) {
  const scene = data.models[state.model].shown[state.scene], [rows, columns] = scene.grid;
  return (state.cubes[kind][(band * rows + row) * columns + column] / (data.levels - 1)) * scene.top;
}

function drawBand() {
  if (!state.cubes) return;
  const model = data.models[state.model], scene = model.shown[state.scene], [rows, columns] = scene.grid;
  byId("nm").textContent = `${show(model.wavelengths[state.band])} nm`;
  const canvas = byId("bandimage"), pen = canvas.getContext("2d");
  canvas.width = columns; canvas.height = rows;
  const image = pen.createImageData(columns, rows);
  let most = 1e-6;
  for (let i = 0; i < rows * columns; i++) most = Math.max(most, value("predicted", state.band, 0, i));
  for (let i = 0; i < rows * columns; i++) {
    const grey = 255 * Math.sqrt(value("predicted", state.band, 0, i) / most);
    image.data.set([grey, grey, grey, 255], 4 * i);
  }
  pen.putImageData(image, 0, 0);
  byId("bandscale").textContent = `predicted band, white ${show(most)}`;
  canvas.dataset.band = state.band;
}

function drawSpectra() {
  if (!state.cubes) return;
  const model = data.models[state.model], scene = model.shown[state.scene], [rows, columns] = scene.grid;
  const series = [], found = [];
  state.points.forEach(([u, v], index) => {
    const row = Math.min(rows - 1, Math.floor(v * rows)), column = Math.min(columns - 1, Math.floor(u * columns));
    const take = (kind) => model.wavelengths.map((_, band) => value(kind, band, row, column));
    const place = `pixel ${column}, ${row} of ${columns} x ${rows}`, colour = COLOURS[index];
    const predicted = { name: `predicted${state.cubes.scale ? " and its scale" : ""}, ${place}`, x: model.wavelengths, y: take("predicted"), colour };
    if (state.cubes.scale) { predicted.spread = take("scale"); predicted.band = predicted.y.map((y, i) => y + predicted.spread[i]); }
    series.push(predicted);
    if (state.cubes.measured) series.push({ name: `measured, ${place}`, x: model.wavelengths, y: take("measured"), colour, dashed: true });
    found.push({ row, column, predicted: predicted.y, measured: state.cubes.measured ? take("measured") : null });
  });
  plot(byId("spectra"), series, { x: "wavelength, nm", y: "reflectance" });
  legend(byId("legend"), series);
  byId("spectra").dataset.points = JSON.stringify(found);
  document.querySelectorAll("canvas.pick").forEach((canvas) => {
    canvas.width = canvas.clientWidth; canvas.height = canvas.clientHeight;
    const pen = canvas.getContext("2d");
    state.points.forEach(([u, v], index) => {
      pen.lineWidth = 5; pen.strokeStyle = "#ffffff"; pen.beginPath(); pen.arc(u * canvas.width, v * canvas.height, 7, 0, 7); pen.stroke();
      pen.lineWidth = 2.5; pen.strokeStyle = COLOURS[index]; pen.beginPath(); pen.arc(u * canvas.width, v * canvas.height, 7, 0, 7); pen.stroke();
    });
  });
}

function choose(u, v, second) {
  const point = [Math.min(0.999, Math.max(0, u)), Math.min(0.999, Math.max(0, v))];
  if (second || byId("second").checked) state.points[1] = point; else state.points[0] = point;
  drawSpectra();
}

document.querySelectorAll("canvas.pick").forEach((canvas) => {
  canvas.onclick = (event) => { const box = canvas.getBoundingClientRect(); choose((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, event.shiftKey); };
  canvas.onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [rows, columns] = data.models[state.model].shown[state.scene].grid;
    const [u, v] = state.points[event.shiftKey || byId("second").checked ? 1 : 0] || state.points[0];
    choose(u + step[0] / columns, v + step[1] / rows, event.shiftKey);
  };
});

function listScenes() {
  const model = data.models[state.model];
  byId("scene").replaceChildren(...model.shown.map((scene, index) => new Option(scene.why ? `${scene.name} (${scene.why}, MRAE ${show(scene.mrae)})` : scene.name, index)));
  byId("scenes-choice").hidden = model.shown.length < 2;
  byId("band").max = model.wavelengths.length - 1;
  state.band = Math.min(state.band, model.wavelengths.length - 1);
  byId("band").value = state.band;
  state.scene = 0;
}

// --- the page

document.title = byId("title").textContent = data.title;
byId("about").textContent = data.about;
fill(byId("headline"), data.headline.head, data.headline.rows, false);
fill(byId("scenes"), data.scenes.head, data.scenes.rows, true);
byId("settings").textContent = data.settings;
byId("model").append(...data.models.map((model, index) => new Option(model.name, index)));
byId("models-choice").hidden = data.models.length < 2;
state.band = Math.floor(data.models[0].wavelengths.length / 2);
byId("model").onchange = (event) => { state.model = Number(event.target.value); listScenes(); openScene(); };
byId("scene").onchange = (event) => { state.scene = Number(event.target.value); openScene(); };
byId("band").oninput = (event) => { state.band = Number(event.target.value); drawBand(); };
if (data.stress.rows.length) { byId("stressed").hidden = false; fill(byId("stress"), data.stress.head, data.stress.rows, true); }

document.querySelectorAll("section.numbers").forEach((section) => { section.hidden = !data.headline.rows.length; });

function plotModels(name, models, curve, options) { // a curve a model, and whose it is where there are several
  const series = models.map((model) => ({ name: model.name, colour: COLOURS[data.models.indexOf(model) % COLOURS.length], ...curve(model) }));
  plot(byId(name), series, options);
  if (data.models.length > 1) legend(byId(`${name}-legend`), series);
}

function drawCurves() {
  if (!data.headline.rows.length) return;
  const over = (key) => (model) => ({ x: model.wavelengths, y: model.per_band[key] });
  plotModels("bandmrae", data.models, over("mrae"), { x: "wavelength, nm", y: "MRAE" });
  plotModels("bandrmse", data.models, over("rmse"), { x: "wavelength, nm", y: "RMSE" });
  const learned = data.models.filter((model) => model.learning.steps.length > 1);
  byId("learning").hidden = !learned.length;
  if (learned.length) plotModels("curve", learned, (m) => ({ x: m.learning.steps, y: m.learning.mrae }), { x: "step", y: "MRAE", zero: false });
  const scaled = data.models.filter((model) => model.calibration);
  byId("calibrated").hidden = !scaled.length;
  if (scaled.length) plotModels("calibration", scaled, (m) => ({ x: m.calibration.scale, y: m.calibration.mean_absolute_error }), { x: "predicted scale", y: "mean absolute error", diagonal: true });
}

listScenes();
drawCurves();
openScene().then(() => { document.body.dataset.ready = "yes"; });
window.addEventListener("resize", () => { drawCurves(); drawSpectra(); });
