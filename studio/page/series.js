// The columns of a run: loaded once, then continued by its events.

/** A run's columns. `add(event)` takes a line of events.jsonl; `changed` is called after it. */
export class Series {
  constructor(given) { this.take(given); }

  /** Takes the columns that the server gives. */
  take(given) {
    Object.assign(this, {
      steps: given.steps, loss: given.loss, low: given.low ?? null, high: given.high ?? null, rate: given.rate ?? [],
      validation: given.validation, checkpoints: given.checkpoints, saved: given.saved, previews: given.previews,
      generated: given.generated ?? [], resumed: [...given.resumed], void: [...given.void],
    });
    // `seconds` of a thinned point are the mean of the steps that it stands for.
    this.time = [];
    given.steps.forEach((step, index) => {
      const last = index ? given.steps[index - 1] : 0;
      this.time.push((this.time[index - 1] ?? 0) + (given.seconds[index] ?? 0) * Math.max(1, step - last));
    });
  }

  get last() { return this.steps.at(-1) ?? 0; }

  /** Takes an event; returns whether anything that is drawn has changed. */
  add(event) {
    if (event.type === "steps") {
      const each = (event.seconds ?? 0) / Math.max(1, event.loss.length);
      event.loss.forEach((loss, index) => {
        const step = event.from + index;
        if (step <= this.last) return; // seen
        this.steps.push(step);
        this.loss.push(loss);
        this.rate.push(one(event.rate));
        this.time.push((this.time.at(-1) ?? 0) + each);
        this.low?.push(loss);
        this.high?.push(loss);
      });
    } else if (event.type === "validation") {
      const sigmas = {};
      event.sigmas.forEach((sigma, index) => { sigmas[Number(sigma.toPrecision(6))] = event.loss[index]; });
      this.validation.push({ step: event.step, mean: event.mean, kind: event.kind, sigmas });
    } else if (event.type === "preview" || event.type === "generated") {
      (event.type === "preview" ? this.previews : this.generated).push(event);
    } else if (event.type === "checkpoint") this.checkpoints.push(event.step);
    else if (event.type === "saved") this.saved.push(event.step);
    else if (event.type === "resumed") this.#resume(event.step);
    else return false;
    return true;
  }

  /** What was drawn of later steps is void. */
  #resume(step) {
    this.resumed.push(step);
    let kept = this.steps.length;
    while (kept && this.steps[kept - 1] > step) kept--;
    if (kept < this.steps.length) this.void.push({ steps: this.steps.slice(kept), loss: this.loss.slice(kept) });
    for (const column of [this.steps, this.loss, this.rate, this.time, this.low, this.high]) column?.splice(kept);
    for (const name of ["validation", "previews"]) this[name] = this[name].filter((each) => each.step <= step);
    this.checkpoints = this.checkpoints.filter((each) => each <= step);
  }

  /** The seconds of training at a step, between the points that are known. */
  seconds(step) {
    const index = this.index(step);
    if (index < 0) return 0;
    if (index + 1 >= this.steps.length || this.steps[index] >= step) return this.time[index];
    const part = (step - this.steps[index]) / (this.steps[index + 1] - this.steps[index]);
    return this.time[index] + part * (this.time[index + 1] - this.time[index]);
  }

  /** The last point at or before a step; -1: before the first. */
  index(step) {
    let low = 0, high = this.steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] <= step) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  /** Whether the line is cut before the point: the run was resumed there. */
  cutBefore(index) {
    return this.resumed.some((step) => step < this.steps[index] && step >= (this.steps[index - 1] ?? Infinity));
  }

  /** The loss, smoothed over about `over` steps, without the bias of its start. */
  smoothed(over) {
    const keep = over <= 1 ? 0 : 1 - 1 / over;
    let mean = 0, weight = 0, before = 0;
    return this.loss.map((loss, index) => {
      const step = this.steps[index], kept = keep ** Math.max(1, step - before);
      before = step;
      if (loss === null || loss === undefined) return null;
      mean = kept * mean + (1 - kept) * loss;
      weight = kept * weight + 1 - kept;
      return mean / weight;
    });
  }
}

function one(value) {
  if (typeof value === "number") return value;
  return value?.lora ?? Object.values(value ?? {})[0] ?? null;
}

/** At most `most` rows, evenly taken, with the first and the last. */
export function thinned(rows, most = 40) {
  if (rows.length <= most) return rows;
  return Array.from({ length: most }, (_, index) => rows[Math.round((index * (rows.length - 1)) / (most - 1))]);
}
