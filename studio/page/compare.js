// Two to four runs over each other.

import { api, path, precise, stored } from "./core.js";
import { fill, h, icon, linkButton, withTokens } from "./dom.js";
import { humanName } from "./forms.js";
import { title } from "./main.js";
import { Plot, Readout, Shared, axes, colour, segmented, smoothingSlider, tableButton, yScale } from "./plot.js";
import { nearest } from "./previews.js";
import { Series, thinned } from "./series.js";

const MOST = 4;
const colours = (number) => `--run-${number + 1}`;

/** Shows the comparison. */
export async function show(root, given, signal) {
  title("Compare");
  const ids = [...new Set(given)].slice(0, MOST);
  const answers = await Promise.all([api("GET", `/api/compare?runs=${ids.map(encodeURIComponent).join(",")}`, undefined, { signal }), ...ids.map((id) => api("GET", path("api/runs", id), undefined, { signal }))]);
  const [found, ...summaries] = answers;
  const runs = found.runs.map((each, number) => ({ id: each.id, series: new Series(each.series), run: summaries[number], number }));
  const mark = (number) => h("i", { class: `mark run-${number + 1}` });
  const name = (each) => h("span", { class: "run-label" }, mark(each.number), h("a", { href: `#/runs/${encodeURIComponent(each.id)}` }, each.run.title));

  // ---- Curves ---------------------------------------------------------------------------------
  const set = { over: stored.get("smoothing", 50), log: false };
  const shared = new Shared(() => Math.max(1, ...runs.map((each) => Math.max(each.series.last, each.series.validation.at(-1)?.step ?? 0))));
  const curve = (read, label, points) => {
    const readout = new Readout();
    let data = [[]];
    const showAt = (index) => {
      if (index === null) return readout.show(runs.map((each, number) => [each.run.title, data[number + 1]?.findLast((value) => value !== null && value !== undefined), `run-${number + 1}`]));
      readout.show([["step", data[0][index]?.toLocaleString("en")], ...runs.map((each, number) => [each.run.title, data[number + 1][index], `run-${number + 1}`])]);
    };
    const plot = new Plot(() => {
      data = uPlot.join(runs.map((each) => read(each.series)));
      const line = (number) => ({ stroke: () => colour(colours(number)), width: 2, points: { show: points, size: 5, stroke: () => colour(colours(number)), fill: () => colour(colours(number)) } });
      return { data, options: { y: yScale(set.log), axes: axes({ log: set.log }), series: [{}, ...runs.map((_, number) => line(number))] } };
    }, { label: `${label}; the button Table has its values`, signal, shared, readout: showAt });
    const table = tableButton(label, () => [["Step", ...runs.map((each) => each.run.title)], thinned(data[0].map((step, index) => [step.toLocaleString("en"), ...runs.map((_, number) => precise(data[number + 1][index]))]))]);
    return { plot, readout, table };
  };
  const loss = curve((series) => [series.steps, series.smoothed(set.over)], "Training loss, smoothed", false);
  const heldOut = curve((series) => [series.validation.map((each) => each.step), series.validation.map((each) => each.mean)], "Loss on fixed images", true);
  const hasHeldOut = runs.some((each) => each.series.validation.length > 0);
  const section = (heading, each, tools, text) => h("section", { class: "card plot-card" }, h("div", { class: "plot-heading" }, h("h2", null, heading), each.table), h("div", { class: "plot-settings" }, tools), each.readout.node, each.plot.node, h("p", { class: "help" }, text));
  const plots = h(
    "div", { class: "plots" },
    section("Training loss", loss, [smoothingSlider(set.over, (over) => { set.over = over; stored.set("smoothing", over); loss.plot.update(); }), segmented("Scale of the loss", [[false, "Linear"], [true, "Log"]], false, (value) => { set.log = value; loss.plot.build(); heldOut.plot.build(); })], "The training loss shows the random noise levels and not progress. It can be compared only if batch size and noise levels are the same."),
    hasHeldOut && section("Loss on fixed images", heldOut, [], "The mean of all noise levels, with the same noise at each measurement. It can be compared if the dataset and the base model are the same."),
  );

  // ---- Settings -------------------------------------------------------------------------------
  const text = (value) => (value === null || value === undefined || value === "" ? h("span", { class: "dim" }, "–") : Array.isArray(value) ? value.map((each) => h("div", null, String(each))) : value === true ? "yes" : value === false ? "no" : typeof value === "object" ? JSON.stringify(value) : String(value));
  const settings = h(
    "section", { class: "card stack" }, h("h2", null, "Settings that differ"),
    found.differ.length ? h("div", { class: "scroll" }, h("table", { class: "differ" }, h("thead", null, h("tr", null, h("th", { scope: "col" }, "Setting"), runs.map((each) => h("th", { scope: "col" }, name(each))))), h("tbody", null, found.differ.map((each) => h("tr", null, h("th", { scope: "row", title: each.name }, humanName(each.name)), each.values.map((value) => h("td", null, text(value)))))))) : h("p", { class: "dim" }, "All settings are the same."),
  );

  // ---- Previews -------------------------------------------------------------------------------
  const steps = [...new Set(found.previews.flatMap((each) => each.files.flat().map((one) => one.step)))].sort((a, b) => a - b);
  const slider = h("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), value: steps.length - 1, "aria-label": "Step of the previews" });
  const at = h("output", { class: "step-output" });
  const images = h("div", { class: "stack wide-gap" });
  const blocks = found.previews.map((each) => {
    const places = each.files.map((files, number) => {
      const image = h("img"), caption = h("small"), known = new Map(files.map((one) => [one.step, one.file]));
      const plate = h("a", { class: "plate preview", target: "_blank" }, image);
      const node = h("figure", null, known.size ? plate : h("div", { class: "plate preview nothing" }, icon("image")), h("figcaption", null, mark(number), h("span", null, runs[number].run.title), caption));
      return { node, update(step) {
        if (!known.size) { caption.textContent = "no preview"; return; }
        const one = nearest(known, step);
        const address = path("api/runs", runs[number].id, "files", one.file);
        if (image.getAttribute("src") !== address) image.src = plate.href = address;
        image.alt = `${runs[number].run.title}: ${each.prompt}, step ${one.step}, seed ${each.seed}`;
        caption.textContent = one.step === 0 ? "before" : `step ${one.step.toLocaleString("en")}`;
        caption.classList.toggle("off", one.step !== step);
      } };
    });
    images.append(h("div", { class: "stack tight" }, h("p", null, withTokens(each.prompt), " ", h("small", null, `seed ${each.seed}`)), h("div", { class: "side-by-side", style: { "--columns": runs.length } }, places.map((place) => place.node))));
    return places;
  });
  const draw = () => {
    const step = steps[slider.value];
    at.textContent = step === 0 ? "before" : String(step ?? "");
    slider.setAttribute("aria-valuetext", at.textContent);
    for (const each of blocks.flat()) each.update(step);
  };
  slider.addEventListener("input", draw);
  if (steps.length) draw();
  const previews = h("section", { class: "card stack" }, h("h2", null, "Previews"), steps.length ? [h("div", { class: "preview-tools" }, h("label", { class: "smoothing grow" }, h("span", null, "Step"), slider, at)), images] : h("p", { class: "dim" }, "These runs have no previews of the same prompt and seed."));

  fill(
    root,
    h("nav", { class: "crumb", "aria-label": "Place" }, h("a", { href: "#/runs" }, icon("left"), "Runs")),
    h("div", { class: "heading" }, h("h1", null, "Compare"), h("div", { class: "row" }, runs.map((each) => h("span", { class: "badge run-badge" }, name(each))), linkButton("Choose others", "#/runs"))),
    plots, settings, previews,
  );
}
