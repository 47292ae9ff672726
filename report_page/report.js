"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe and Ito 2008
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
        button.textContent = name;
        button.onclick = () => {
          order = order && order.column === column ? { column, up: !order.up } : { column, up: true };
          const sign = order.up ? 1 : -1;
          rows.sort((a, b) => sign * (a[column] > b[column] ? 1 : a[column] < b[column] ? -1 : 0));
          draw();
        };
        if (order && order.column === column) cell.ariaSort = order.up ? "ascending" : "descending";
        cell.append(button);
      } else cell.textContent = name;
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

function plot(canvas, series, { x = "", y = "", zero = true, diagonal = false } = {}) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth || 600, height = Math.max(220, width * 0.42);
  canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio); pen.font = "12px system-ui, sans-serif"; pen.fillStyle = "#1b1b1b";
  const xs = series.flatMap((s) => s.x), ys = series.flatMap((s) => s.band ? [...s.y, ...s.band] : s.y).filter(Number.isFinite);
  let [left, right] = [Math.min(...xs), Math.max(...xs)], low = zero ? Math.min(0, ...ys) : Math.min(...ys), high = Math.max(...ys);
  if (right === left) right = left + 1;
  if (high === low) high = low + 1;
  const box = { l: 58, r: width - 12, t: 10, b: height - 34 };
  const px = (v) => box.l + ((v - left) / (right - left)) * (box.r - box.l), py = (v) => box.b - ((v - low) / (high - low)) * (box.b - box.t);
  pen.strokeStyle = "#dddddd"; pen.textAlign = "right"; pen.textBaseline = "middle";
  for (let i = 0; i <= 4; i++) {
    const v = low + ((high - low) * i) / 4;
    pen.beginPath(); pen.moveTo(box.l, py(v)); pen.lineTo(box.r, py(v)); pen.stroke();
    pen.fillText(show(Number(v.toPrecision(2))), box.l - 6, py(v));
  }
  pen.textAlign = "center"; pen.textBaseline = "top";
  for (let i = 0; i <= 6; i++) { const v = left + ((right - left) * i) / 6; pen.fillText(show(Number(v.toPrecision(3))), px(v), box.b + 5); }
  pen.fillText(x, (box.l + box.r) / 2, box.b + 20);
  pen.save(); pen.translate(10, (box.t + box.b) / 2); pen.rotate(-Math.PI / 2); pen.fillText(y, 0, -6); pen.restore();
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
    const item = document.createElement("span");
    item.textContent = (s.dashed ? "- - " : "—— ") + s.name + "   ";
    item.style.color = s.colour || COLOURS[index % COLOURS.length];
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
  state.cubes = {};
  for (const kind of ["measured", "predicted", "scale"]) if (scene[kind]) state.cubes[kind] = await unpack(scene[kind], model.wavelengths.length);
  drawBand(); drawSpectra();
}

function value(kind, band, row, column) {
  const scene = data.models[state.model].shown[state.scene], [rows, columns] = scene.grid;
  return (state.cubes[kind][(band * rows + row) * columns + column] / (data.levels - 1)) * scene.top;
}

function drawBand() {
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
  canvas.dataset.band = state.band;
}

function drawSpectra() {
  const model = data.models[state.model], scene = model.shown[state.scene], [rows, columns] = scene.grid;
  const series = [], found = [];
  state.points.forEach(([u, v], index) => {
    const row = Math.min(rows - 1, Math.floor(v * rows)), column = Math.min(columns - 1, Math.floor(u * columns));
    const take = (kind) => model.wavelengths.map((_, band) => value(kind, band, row, column));
    const place = `pixel ${column}, ${row} of ${columns} x ${rows}`, colour = COLOURS[index];
    const predicted = { name: `predicted, ${place}`, x: model.wavelengths, y: take("predicted"), colour };
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
  if (second) state.points[1] = point; else state.points[0] = point;
  drawSpectra();
}

document.querySelectorAll("canvas.pick").forEach((canvas) => {
  canvas.onclick = (event) => { const box = canvas.getBoundingClientRect(); choose((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, event.shiftKey); };
  canvas.onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [rows, columns] = data.models[state.model].shown[state.scene].grid;
    const [u, v] = state.points[event.shiftKey ? 1 : 0] || state.points[0];
    choose(u + step[0] / columns, v + step[1] / rows, event.shiftKey);
  };
});

function listScenes() {
  const model = data.models[state.model];
  byId("scene").replaceChildren(...model.shown.map((scene, index) => new Option(scene.why ? `${scene.name} (${scene.why}, MRAE ${show(scene.mrae)})` : scene.name, index)));
  byId("band").max = model.wavelengths.length - 1;
  state.scene = 0;
}

// --- the page

byId("title").textContent = data.title;
byId("about").textContent = data.about;
fill(byId("headline"), data.headline.head, data.headline.rows, false);
fill(byId("scenes"), data.scenes.head, data.scenes.rows, true);
byId("settings").textContent = data.settings;
byId("model").append(...data.models.map((model, index) => new Option(model.name, index)));
byId("model").onchange = (event) => { state.model = Number(event.target.value); listScenes(); openScene(); };
byId("scene").onchange = (event) => { state.scene = Number(event.target.value); openScene(); };
byId("band").oninput = (event) => { state.band = Number(event.target.value); drawBand(); };
if (data.stress.rows.length) { byId("stressed").hidden = false; fill(byId("stress"), data.stress.head, data.stress.rows, true); }

document.querySelectorAll("section.numbers").forEach((section) => { section.hidden = !data.headline.rows.length; });

function drawCurves() {
  if (!data.headline.rows.length) return;
  const over = (key) => data.models.map((model) => ({ name: model.name, x: model.wavelengths, y: model.per_band[key] }));
  plot(byId("bandmrae"), over("mrae"), { x: "wavelength, nm", y: "MRAE" });
  plot(byId("bandrmse"), over("rmse"), { x: "wavelength, nm", y: "RMSE" });
  const learned = data.models.filter((model) => model.learning.steps.length > 1);
  byId("learning").hidden = !learned.length;
  if (learned.length) plot(byId("curve"), learned.map((m) => ({ name: m.name, x: m.learning.steps, y: m.learning.mrae })), { x: "step", y: "MRAE", zero: false });
  const scaled = data.models.filter((model) => model.calibration);
  byId("calibrated").hidden = !scaled.length;
  if (scaled.length) plot(byId("calibration"), scaled.map((m) => ({ name: m.name, x: m.calibration.scale, y: m.calibration.mean_absolute_error })), { x: "predicted scale", y: "mean absolute error", diagonal: true });
}

listScenes();
drawCurves();
openScene().then(() => { document.body.dataset.ready = "yes"; });
window.addEventListener("resize", () => { drawCurves(); if (state.cubes) drawSpectra(); });
