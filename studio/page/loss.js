// The two plots of a run: training loss, and the loss on fixed images and noise.

import { duration, precise, stored } from "./core.js";
import { fill, h } from "./dom.js";
import { Plot, Readout, Shared, axes, colour, segmented, smoothingSlider, tableButton, yScale } from "./plot.js";
import { thinned } from "./series.js";

const NOISE = ["--noise-1", "--noise-2", "--noise-3", "--noise-4"];

/** Both plots of a run: {node, update()}. `isOver()`: nothing more will come. */
export function lossPlots(series, signal, isOver) {
  const set = { over: stored.get("smoothing", 50), log: false, time: false, whole: false };
  const x = (step) => (set.time ? series.seconds(step) : step);
  const at = (step, value) => [set.time ? "time" : "step", set.time ? duration(value) : step.toLocaleString("en")];
  const shared = new Shared(() => Math.max(x(series.last), x(series.validation.at(-1)?.step ?? 0), set.time ? 0.1 : 1));

  // ---- Training loss --------------------------------------------------------------------------
  let smooth = [];
  const trainingReadout = new Readout();
  const showTraining = (index) => {
    const shown = index ?? series.steps.length - 1;
    if (shown < 0 || shown >= series.steps.length) return trainingReadout.show([["loss", "–"]]);
    const loss = series.loss[shown];
    trainingReadout.show([at(series.steps[shown], series.time[shown]), ["smoothed", smooth[shown], "strong"], ["loss", loss ?? "not a number", "pale"], ["learning rate", series.rate[shown] && String(Number(series.rate[shown].toPrecision(2)))]]);
  };
  const cuts = (plot, number, from, to, gaps) => {
    for (let index = Math.max(1, from); index <= to; index++) {
      if (series.cutBefore(index)) gaps.push([plot.valToPos(plot.data[0][index - 1], "x", true), plot.valToPos(plot.data[0][index], "x", true)]);
    }
    return gaps.sort((a, b) => a[0] - b[0]);
  };
  const training = new Plot(() => {
    smooth = series.smoothed(set.over);
    const xs = set.time ? series.time : series.steps;
    const positive = (values) => (set.log ? values.map((value) => (value > 0 ? value : null)) : values);
    const bounds = series.low ? [positive(series.low), positive(series.high)] : [];
    const line = (name, width, more) => ({ stroke: () => colour(name), width, points: { show: false }, gaps: cuts, ...more });
    return {
      data: [xs, positive(series.loss), positive(smooth), ...bounds].map((column) => [...column]),
      options: {
        y: yScale(set.log),
        axes: axes({ time: set.time, log: set.log }),
        series: [{}, line("--plot-pale", 1), line("--accent", 2), ...bounds.map(() => ({ stroke: "transparent", width: 0, points: { show: false } }))],
        bands: bounds.length ? [{ series: [4, 3], fill: () => colour("--plot-band") }] : [],
        draw: marks,
      },
    };
  }, { label: "Training loss; the button Table has its values", signal, shared, readout: showTraining });

  function marks(ctx, box, scale, xAt, yAt) {
    const bottom = box.top + box.height;
    ctx.lineWidth = scale;
    // What was given up by a resume.
    ctx.strokeStyle = colour("--plot-void");
    for (const part of series.void) {
      ctx.beginPath();
      let open = false;
      const every = Math.max(1, Math.floor(part.steps.length / 1000));
      const first = x(Math.min(part.steps[0] ?? 0, series.last));
      for (let index = 0; index < part.steps.length; index += every) {
        const loss = part.loss[index];
        if (loss === null || (set.log && loss <= 0)) { open = false; continue; }
        // In time, the points are drawn over those that replaced them.
        const across = set.time && part.steps[index] > series.last ? first : x(part.steps[index]);
        ctx[open ? "lineTo" : "moveTo"](xAt(across), yAt(loss));
        open = true;
      }
      ctx.stroke();
    }
    ctx.setLineDash([4 * scale, 4 * scale]);
    ctx.strokeStyle = colour("--dim");
    for (const step of series.resumed) vertical(ctx, xAt(x(step)), box);
    ctx.setLineDash([]);
    // Losses that are not numbers.
    ctx.strokeStyle = ctx.fillStyle = colour("--bad");
    let before = -Infinity;
    series.loss.forEach((loss, index) => {
      if (loss !== null && loss !== undefined) return;
      const place = xAt(x(series.steps[index]));
      if (place - before < 5 * scale) return;
      before = place;
      ctx.globalAlpha = 0.35;
      vertical(ctx, place, box);
      ctx.globalAlpha = 1;
      cross(ctx, place, box.top + 7 * scale, 3.5 * scale);
    });
    ctx.fillStyle = colour("--text");
    for (const step of new Set([...series.checkpoints, ...series.saved])) triangle(ctx, xAt(x(step)), bottom - 3 * scale, 4 * scale);
    ctx.fillStyle = colour("--good");
    for (const step of new Set(series.previews.map((each) => each.step))) {
      ctx.beginPath();
      ctx.arc(xAt(x(step)), bottom - 15 * scale, 3 * scale, 0, 7);
      ctx.fill();
    }
  }

  // ---- Held-out loss --------------------------------------------------------------------------
  const sigmas = () => Object.keys(series.validation[0]?.sigmas ?? {}).sort((a, b) => a - b);
  const values = (read) => {
    const start = read(series.validation[0]);
    return series.validation.map((each) => {
      const value = read(each);
      if (value === null || value === undefined) return null;
      return set.whole || !start ? value : 100 * (value / start - 1);
    });
  };
  const shownValue = (value) => (value === null || value === undefined ? "–" : set.whole ? precise(value) : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(Math.abs(value) < 10 ? 1 : 0)} %`);
  const heldOutReadout = new Readout();
  let columns = [];
  const showHeldOut = (index) => {
    const shown = index ?? series.validation.length - 1, each = series.validation[shown];
    if (!each) return heldOutReadout.show([]);
    heldOutReadout.show([at(each.step, x(each.step)), ["mean", shownValue(columns[1]?.[shown]), "strong"], ...sigmas().map((sigma, number) => [`noise ${Number(sigma).toFixed(2)}`, shownValue(columns[number + 2]?.[shown]), `noise-${(number % 4) + 1}`])]);
  };
  const heldOut = new Plot(() => {
    const names = sigmas();
    columns = [series.validation.map((each) => x(each.step)), values((each) => each.mean), ...names.map((name) => values((each) => each.sigmas[name]))];
    const line = (name, width) => ({ stroke: () => colour(name), width, points: { show: true, size: width > 1 ? 6 : 4, fill: () => colour(name), stroke: () => colour(name) }, spanGaps: false });
    return {
      data: columns,
      options: {
        axes: axes({ time: set.time, y: set.whole ? null : (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Number(Math.abs(value).toPrecision(3))} %` }),
        series: [{}, line("--accent", 2.5), ...names.map((_, number) => line(NOISE[number % 4], 1))],
        draw: (ctx, box, scale, xAt, yAt) => {
          if (set.whole) return;
          ctx.strokeStyle = colour("--line-strong");
          ctx.lineWidth = scale;
          ctx.beginPath();
          ctx.moveTo(box.left, yAt(0));
          ctx.lineTo(box.left + box.width, yAt(0));
          ctx.stroke();
        },
      },
    };
  }, { label: "Loss on fixed images by noise level; the button Table has its values", signal, shared, readout: showHeldOut });

  // ---- Together -------------------------------------------------------------------------------
  const heldTitle = h("h2"), heldText = h("p", { class: "help" }), heldBody = h("div", { class: "plot-place" });
  const isWaiting = h("p", { class: "plot-empty dim" }), waiting = h("p", { class: "plot-empty dim" });
  const trainingBody = h("div", { class: "plot-place" });
  let levels = -1, isThinned = false;
  /** Shows what has changed; `rebuilt`: plots that need new axes, as one does that has other columns. */
  const update = (rebuilt = []) => {
    const fit = series.validation[0]?.kind === "fit";
    heldTitle.textContent = fit ? "Loss on training images" : "Held-out loss";
    heldText.textContent = fit
      ? "Measured on training images with fixed noise, so its points can be compared. It shows how well the images are learned, and not how well that carries over to others."
      : "Measured on images that are not trained on, with fixed noise: falling means that it learns, rising for long means that it learns the images by heart.";
    isWaiting.textContent = isOver() ? "Nothing was measured." : "The first measurement is not there yet.";
    waiting.textContent = isOver() ? "This run has not trained." : "The first losses appear when training begins.";
    if (trainingBody.firstChild !== (series.steps.length ? training.node : waiting)) fill(trainingBody, series.steps.length ? training.node : waiting);
    const has = series.validation.length > 0;
    if (heldBody.firstChild !== (has ? heldOut.node : isWaiting)) fill(heldBody, has ? heldOut.node : isWaiting);
    if (levels !== sigmas().length) rebuilt = [...rebuilt, heldOut];
    levels = sigmas().length;
    if (isThinned !== Boolean(series.low)) rebuilt = [...rebuilt, training];
    isThinned = Boolean(series.low);
    for (const each of [training, heldOut]) rebuilt.includes(each) || !each.plot ? each.build() : each.update();
  };
  const changed = (name, ...plots) => (value) => {
    set[name] = value;
    if (name === "time") shared.part = null;
    update(plots);
  };
  const node = h(
    "div", { class: "plots" },
    h("section", { class: "card plot-card" },
      h("div", { class: "plot-heading" }, h("h2", null, "Training loss"), tableButton("Training loss", () => [["Step", "Time", "Loss", "Smoothed", "Learning rate"], thinned(series.steps.map((step, index) => [step.toLocaleString("en"), duration(series.time[index]), series.loss[index] === null ? "not a number" : precise(series.loss[index]), precise(smooth[index]), precise(series.rate[index])]))])),
      h("div", { class: "plot-settings" }, smoothingSlider(set.over, (over) => { set.over = over; stored.set("smoothing", over); training.update(); }), segmented("Scale of the loss", [[false, "Linear"], [true, "Log"]], set.log, changed("log", training)), segmented("Across", [[false, "Steps"], [true, "Time"]], set.time, changed("time", training, heldOut))),
      trainingReadout.node, trainingBody,
      h("p", { class: "plot-key" }, h("span", null, h("i", { class: "mark checkpoint" }), "checkpoint"), h("span", null, h("i", { class: "mark preview" }), "preview"), h("span", null, h("i", { class: "mark nan" }), "not a number"), h("span", null, h("i", { class: "mark resumed" }), "resumed; given up in grey")),
      h("p", { class: "help" }, "Each step has a random noise level, and the loss depends mostly on that: the training loss shows the noise level and not progress.")),
    h("section", { class: "card plot-card" },
      h("div", { class: "plot-heading" }, heldTitle, tableButton("Loss on fixed images", () => [["Step", "Mean", ...sigmas().map((sigma) => `Noise ${Number(sigma).toFixed(2)}`)], thinned(series.validation.map((each) => [each.step.toLocaleString("en"), precise(each.mean), ...sigmas().map((sigma) => precise(each.sigmas[sigma]))]))])),
      h("div", { class: "plot-settings" }, segmented("Values", [[false, "Change from the start"], [true, "Loss"]], set.whole, changed("whole", heldOut))),
      heldOutReadout.node, heldBody,
      h("p", { class: "plot-key" }, h("span", null, h("i", { class: "mark strong" }), "mean"), h("span", null, NOISE.map((_, number) => h("i", { class: `mark noise-${number + 1}` })), "little to much noise")),
      heldText),
  );
  update();
  return { node, update };
}

function vertical(ctx, place, box) {
  ctx.beginPath();
  ctx.moveTo(place, box.top);
  ctx.lineTo(place, box.top + box.height);
  ctx.stroke();
}

function cross(ctx, x, y, size) {
  ctx.lineWidth *= 1.6;
  ctx.beginPath();
  ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
  ctx.moveTo(x + size, y - size); ctx.lineTo(x - size, y + size);
  ctx.stroke();
  ctx.lineWidth /= 1.6;
}

function triangle(ctx, x, y, size) {
  ctx.beginPath();
  ctx.moveTo(x, y - size * 1.6); ctx.lineTo(x + size, y); ctx.lineTo(x - size, y);
  ctx.fill();
}
