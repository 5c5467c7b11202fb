"use strict";
// Reads the JSON in #content: samples, checkpoints, targets, columns of a sheet. Everything that
// comes from a data set enters the page through textContent or setAttribute, never as HTML.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const { samples, targets, checkpoints, columns } = content;
  const byIndex = new Map(samples.map((sample) => [sample.index, sample]));
  const marked = new Set();
  const PER_PAGE = 60;
  const $ = (id) => document.getElementById(id);

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  function number(value) {
    if (value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5)) {
      return String(Number(value.toPrecision(3)));
    }
    return value.toExponential(2);
  }

  const isWrong = (sample) => sample.truth != null && sample.truth !== sample.label;

  function words(sample, kind) {
    const parts = [`${kind} ${sample.index}`];
    if (sample.label != null) parts.push(`labeled ${sample.label}`);
    if (isWrong(sample)) parts.push(`in truth ${sample.truth}`);
    if (marked.has(sample) && kind !== "target") parts.push("marked");
    return parts.join(", ");
  }

  function picture(sample, large) {
    const perSheet = columns * columns;
    const place = sample.sprite % perSheet;
    const box = make("span", { class: `picture sheet-${Math.floor(sample.sprite / perSheet)}${large ? " large" : ""}` });
    box.style.setProperty("--columns", columns);
    box.style.setProperty("--x", place % columns);
    box.style.setProperty("--y", Math.floor(place / columns));
    return box;
  }

  function preview(sample) {
    if (sample.sprite != null) return picture(sample, false);
    if (sample.problem != null) return make("span", { class: "clamp truth" }, sample.problem);
    if (sample.text != null) return make("span", { class: "clamp" }, sample.text.slice(0, 400));
    if (sample.fields != null) {
      const lines = sample.fields.slice(0, 5).map(([name, value]) => `${name}: ${value}`);
      return make("span", { class: "clamp" }, lines.join("\n"));
    }
    return null;
  }

  function spark(values) {
    if (values.length < 2) return null;
    const space = "http://www.w3.org/2000/svg";
    const low = Math.min(0, ...values);
    const span = Math.max(0, ...values) - low || 1;
    const y = (value) => 20 - (20 * (value - low)) / span;
    const svg = document.createElementNS(space, "svg");
    for (const [name, value] of [["class", "spark"], ["viewBox", "0 0 100 20"], ["preserveAspectRatio", "none"], ["aria-hidden", "true"]]) {
      svg.setAttribute(name, value);
    }
    const zero = document.createElementNS(space, "line");
    for (const [name, value] of [["x1", 0], ["x2", 100], ["y1", y(0)], ["y2", y(0)]]) zero.setAttribute(name, value);
    const line = document.createElementNS(space, "polyline");
    const points = values.map((value, i) => `${(100 * i) / (values.length - 1)},${y(value)}`);
    line.setAttribute("points", points.join(" "));
    svg.append(zero, line);
    return svg;
  }

  function cardContent(sample, kind, value, values) {
    const meta = make("span", { class: "meta" });
    if (sample.label != null) meta.append(make("bdi", { class: "label" }, sample.label));
    if (isWrong(sample)) meta.append(" ", make("span", { class: "truth" }, "is ", make("bdi", {}, sample.truth)));
    const note = value == null ? "" : number(value);
    meta.append(make("span", { class: "value" }, sample.sprite == null ? `${kind === "target" ? "target" : "number"} ${sample.index}${note && ", " + note}` : note));
    const chart = values ? spark(values) : null;
    if (chart) meta.append(chart);
    const shown = preview(sample);
    return sample.sprite != null ? [shown, meta] : [meta, shown];
  }

  function classes(sample) {
    return ["card", sample.sprite == null ? "wide" : "", isWrong(sample) ? "wrong" : "", marked.has(sample) ? "marked" : ""].filter(Boolean).join(" ");
  }

  function card(sample, value, values) {
    const name = `${words(sample, "training sample")}, ${number(value)}`;
    const button = make("button", { type: "button", class: classes(sample), "aria-label": name, title: name });
    button.append(...cardContent(sample, "sample", value, values).filter(Boolean));
    button.dataset.index = sample.index;
    return button;
  }

  // --- the gallery ---
  let found = samples;
  let page = 0;
  const moved = (sample) => {
    const [low, high] = [Math.min(...sample.across), Math.max(...sample.across)];
    return high - low;
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  const orders = {
    suspect: (a, b) => a.rank - b.rank,
    trusted: (a, b) => b.rank - a.rank,
    index: (a, b) => a.index - b.index,
    label: (a, b) => collator.compare(a.label ?? "", b.label ?? "") || a.rank - b.rank,
    moved: (a, b) => moved(b) - moved(a) || a.rank - b.rank,
  };
  for (const sample of samples) {
    const texts = [sample.index, sample.label, sample.truth, sample.text, sample.problem, ...(sample.fields || []).flat()];
    sample.haystack = texts.filter((text) => text != null).join("\n").toLowerCase();
  }

  function select() {
    const wanted = $("search").value.trim().toLowerCase();
    const exact = /^\d+$/.test(wanted) ? Number(wanted) : null;
    const [label, known, marks] = [$("label").value, $("known").value, $("marked").value];
    found = samples
      .filter((sample) => !wanted || sample.index === exact || sample.haystack.includes(wanted))
      .filter((sample) => !label || sample.label === label.slice(1))
      .filter((sample) => !known || (sample.truth != null && isWrong(sample) === (known === "wrong")))
      .filter((sample) => !marks || marked.has(sample) === (marks === "yes"))
      .sort(orders[$("sort").value]);
    page = 0;
    draw();
  }

  function draw(focus) {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const some = found.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    $("gallery").replaceChildren(...some.map((sample) => make("li", {}, card(sample, sample.value, null))));
    const cards = $("gallery").querySelectorAll("button");
    cards.forEach((button, i) => { button.tabIndex = i === 0 ? 0 : -1; });
    $("count").textContent = `${found.length.toLocaleString()} of ${samples.length.toLocaleString()} training samples` + (content.total > samples.length ? ` (the most suspect of ${content.total.toLocaleString()})` : "");
    $("page-number").textContent = `page ${page + 1} of ${pages}`;
    $("previous").disabled = page === 0;
    $("next").disabled = page === pages - 1;
    if (focus && cards.length) move(cards, focus === "last" ? cards.length - 1 : 0);
  }

  function move(cards, to) {
    cards.forEach((button, i) => { button.tabIndex = i === to ? 0 : -1; });
    cards[to].focus();
  }

  $("gallery").addEventListener("keydown", (event) => {
    const cards = [...$("gallery").querySelectorAll("button")];
    const at = cards.indexOf(document.activeElement);
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const top = cards[at].getBoundingClientRect().top;
    const inRow = Math.max(1, cards.filter((button) => Math.abs(button.getBoundingClientRect().top - top) < 4).length);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: inRow, ArrowUp: -inRow, Home: -at, End: cards.length - 1 - at };
    if (event.key in steps) move(cards, Math.min(Math.max(at + steps[event.key], 0), cards.length - 1));
    else if (event.key === "PageDown") { page += 1; draw("first"); }
    else if (event.key === "PageUp") { page -= 1; draw("first"); }
    else if (event.key === "m" || event.key === "M") toggle(byIndex.get(Number(cards[at].dataset.index)));
    else return;
    event.preventDefault();
  });

  function toggle(sample) {
    if (!marked.delete(sample)) marked.add(sample);
    for (const button of document.querySelectorAll(`button[data-index="${sample.index}"]`)) {
      button.className = classes(sample);
      button.setAttribute("aria-label", `${words(sample, "training sample")}, ${number(sample.value)}`);
    }
    const numbers = [...marked].map((each) => each.index).sort((a, b) => a - b);
    $("marks-count").textContent = numbers.length;
    $("marks-list").value = numbers.join(", ");
  }

  // --- one sample ---
  let order = [];
  let current = 0;

  function table(head, rows) {
    const line = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, cell)));
    return make("table", {}, make("thead", {}, line(head, "th")), make("tbody", {}, ...rows.map((row) => line(row, "td"))));
  }

  function open(sample, among) {
    order = among;
    current = Math.max(0, among.indexOf(sample));
    show();
    $("detail").showModal();
  }

  function show() {
    const sample = order[current];
    $("detail-title").textContent = `Training sample ${sample.index}`;
    const list = [];
    if (sample.label != null) list.push(["label", sample.label]);
    if (sample.truth != null) list.push(["in truth", sample.truth]);
    list.push(["self-influence", number(sample.value)], ["rank", `${sample.rank + 1} of ${content.total}`]);
    const facts = make("dl", { class: "settings" });
    for (const [name, value] of list) facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, make("bdi", {}, value))));
    const body = $("detail-body");
    body.replaceChildren(facts);
    if (sample.problem != null) body.append(make("p", { class: "truth" }, sample.problem));
    if (sample.text != null) body.append(make("pre", { class: "full", tabindex: 0, "aria-label": "text" }, sample.text));
    const parts = make("div", { class: "columns" });
    if (sample.sprite != null) {
      const large = picture(sample, true);
      large.setAttribute("role", "img");
      large.setAttribute("aria-label", words(sample, "training sample"));
      parts.append(large);
    }
    if (sample.fields != null) parts.append(table(["name", "value"], sample.fields));
    if (sample.across.length > 1) parts.append(table(["checkpoint", "self-influence"], sample.across.map((value, i) => [checkpoints[i], number(value)])));
    const touched = [];
    for (const target of targets) {
      for (const part of [...target.helpful, ...target.harmful]) {
        if (part.index === sample.index) touched.push([words(target, "target"), number(part.value)]);
      }
    }
    if (touched.length) parts.append(table(["explained prediction", "score"], touched));
    body.append(parts);
    $("detail-previous").disabled = current === 0;
    $("detail-next").disabled = current === order.length - 1;
    $("detail-mark").setAttribute("aria-pressed", marked.has(sample));
    $("detail-mark").textContent = marked.has(sample) ? "Marked" : "Mark";
  }

  function turn(step) {
    current = Math.min(Math.max(current + step, 0), order.length - 1);
    show();
  }

  $("detail").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.tagName === "PRE") return;
    if (event.key === "ArrowRight") turn(1);
    else if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "m" || event.key === "M") $("detail-mark").click();
  });
  $("detail-previous").addEventListener("click", () => turn(-1));
  $("detail-next").addEventListener("click", () => turn(1));
  $("detail-mark").addEventListener("click", () => { toggle(order[current]); show(); });
  $("detail-close").addEventListener("click", () => $("detail").close());

  // --- targets ---
  for (const target of targets) {
    const own = make("div", { class: classes(target) });
    if (target.sprite != null) {
      own.setAttribute("role", "img");
      own.setAttribute("aria-label", words(target, "target"));
    }
    own.append(...cardContent(target, "target", null, null).filter(Boolean));
    const side = (name, parts) => {
      const among = parts.map((part) => byIndex.get(part.index));
      const list = make("ul", { class: "gallery", "aria-label": `${name} for target ${target.index}` });
      for (const part of parts) {
        const button = card(byIndex.get(part.index), part.value, part.across);
        button.addEventListener("click", () => open(byIndex.get(part.index), among));
        list.append(make("li", {}, button));
      }
      return make("div", { class: name === "most helpful" ? "help" : "harm" }, make("h3", {}, name), list);
    };
    $("target-list").append(make("section", { class: "target", "aria-label": words(target, "target") },
      make("div", { class: "self" }, make("h3", {}, `target ${target.index}`), own), side("most helpful", target.helpful), side("most harmful", target.harmful)));
  }

  // --- start ---
  const labels = [...new Set(samples.map((sample) => sample.label).filter((label) => label != null))].sort(collator.compare);
  if (labels.length > 1 && labels.length <= 300) {
    for (const label of labels) $("label").append(make("option", { value: "=" + label }, label || "(empty)"));
  } else $("label-filter").hidden = true;
  $("known-filter").hidden = !samples.some((sample) => sample.truth != null);
  $("filters").addEventListener("input", select);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => { page -= 1; draw(); });
  $("next").addEventListener("click", () => { page += 1; draw(); });
  $("gallery").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(byIndex.get(Number(button.dataset.index)), found);
  });
  select();
})();
