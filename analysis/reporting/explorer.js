// The explorer of a report: curves of the stored answers, the questions behind a point, the life of a fact, the worst losses.
"use strict";
(() => {
  const MOST = 200; // rows of a table; the line above it says how many there are
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const rows = data.rows, text = (i) => (i < 0 ? "–" : data.texts[i]);
  const root = document.getElementById("explorer"), find = (name) => root.querySelector("[data-" + name + "]");
  const every = rows.q.map((_, i) => i);
  const splitOf = (i) => text(data.questions.split[rows.q[i]]);
  const factOf = (i) => data.questions.fact[rows.q[i]];
  const unique = (values) => [...new Set(values)];
  const prompt = (i) => {
    const q = rows.q[i], image = data.questions.image[q];
    return text(data.questions.prompt[q]) + (image < 0 ? "" : " [picture " + text(image) + "]");
  };
  const score = (i) => rows[find("mode").value][i];
  const percent = (x) => (100 * x).toFixed(1) + " %";
  const verdict = (i) => (score(i) === null ? "not measured" : score(i) >= 1 ? "right" : score(i) > 0 ? percent(score(i)) : "wrong");
  let point = null; // {editor, year}, whose questions are shown

  function element(name, content, attributes) {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    return made;
  }

  function drawn(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function choices(select, pairs) {
    select.replaceChildren(...pairs.map(([value, label]) => element("option", label, { value })));
  }

  function chosenEditors() {
    return [...root.querySelectorAll("[data-editors] input:checked")].map((box) => Number(box.value));
  }

  const AT_YEAR_END = 0, RIGHT_AFTER = 1, OTHER = 2; // values of rows.m
  // The measured answers of the chosen split and moment. The panel's are those of live edits, where the split is about edits.
  function selected() {
    const split = find("split").value, moment = Number(find("moment").value);
    return every.filter((i) => rows.m[i] === moment && (moment === AT_YEAR_END || rows.l[i]) && splitOf(i) === split && score(i) !== null);
  }

  function curves() {
    const points = new Map();
    for (const i of selected()) {
      const key = rows.e[i] + " " + rows.y[i];
      if (!points.has(key)) points.set(key, { editor: rows.e[i], year: rows.y[i], sum: 0, weight: 0, n: 0 });
      const p = points.get(key);
      p.sum += rows.w[i] * score(i); p.weight += rows.w[i]; p.n += 1;
    }
    return [...points.values()].sort((a, b) => a.year - b.year);
  }

  function chart() {
    const shown = chosenEditors(), points = curves().filter((p) => shown.includes(p.editor));
    const years = unique(curves().map((p) => p.year)).sort((a, b) => a - b);
    const width = Math.min(980, Math.max(300, find("chart").clientWidth)), height = 280, left = 52, step = (width - left - 48) / Math.max(1, years.length - 1);
    const x = (year) => left + 24 + (years.length > 1 ? step * years.indexOf(year) : (width - left) / 2 - 24);
    const beside = (e) => Math.min(6, 28 / shown.length) * (shown.indexOf(e) - (shown.length - 1) / 2); // so that equal points do not hide each other
    const y = (share) => 12 + (height - 46) * (1 - share);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Share right by year; each point is a button" });
    const label = (at, top, content, anchor) => {
      const made = drawn("text", { x: at, y: top, "text-anchor": anchor });
      made.textContent = content;
      svg.append(made);
    };
    for (const share of [0, 0.5, 1]) {
      svg.append(drawn("path", { class: "grid", d: `M${left} ${y(share)}H${width - 12}` }));
      label(left - 6, y(share) + 5, 100 * share + " %", "end");
    }
    label(left - 6, height - 8, "year", "end");
    const every_nth = Math.ceil(years.length / (width < 500 ? 6 : 12));
    years.forEach((year, i) => i % every_nth === 0 && label(x(year), height - 8, year, "middle"));
    for (const e of shown) {
      const own = points.filter((p) => p.editor === e), colour = data.colours[e];
      svg.append(drawn("polyline", { points: own.map((p) => x(p.year) + beside(e) + "," + y(p.sum / p.weight)).join(" "), style: "stroke:" + colour }));
      for (const p of own) {
        const name = `${data.editors[e]}, year ${p.year}: ${percent(p.sum / p.weight)} of ${p.n} answers`;
        const dot = drawn("circle", { cx: x(p.year) + beside(e), cy: y(p.sum / p.weight), r: 7, tabindex: 0, role: "button", "aria-label": name, style: "fill:" + colour });
        const title = drawn("title", {});
        title.textContent = name;
        dot.append(title);
        const open = () => { point = { editor: e, year: p.year }; find("year").value = p.year; questions(); };
        dot.addEventListener("click", open);
        dot.addEventListener("keydown", (event) => { if (["Enter", " "].includes(event.key)) { event.preventDefault(); open(); } });
        svg.append(dot);
      }
    }
    find("chart").replaceChildren(points.length ? svg : element("p", "No answer of this choice was measured.", { class: "soft" }));
  }

  function table(place, heads, lines, said) {
    const body = element("tbody"), made = element("table", undefined, { class: "text" });
    const head = element("tr");
    head.append(...heads.map((h) => element("th", h, { scope: "col" })));
    const top = element("thead");
    top.append(head);
    for (const line of lines.slice(0, MOST)) {
      const row = element("tr");
      line.cells.forEach((cell, i) => row.append(element(i ? "td" : "th", cell, i ? {} : { scope: "row" })));
      if (line.fact >= 0) {
        const button = element("button", "life", { type: "button", value: line.fact });
        button.addEventListener("click", () => { find("fact").value = line.fact; life(); find("life").scrollIntoView({ block: "center" }); });
        row.firstChild.append(" ", button);
      }
      body.append(row);
    }
    made.append(top, body);
    const scroll = element("div", undefined, { class: "scroll", tabindex: 0 });
    scroll.append(made);
    const more = lines.length > MOST ? ` The first ${MOST} are shown.` : "";
    place.replaceChildren(element("p", said + more, { class: "soft" }), ...(lines.length ? [scroll] : []));
  }

  function questions() {
    const year = Number(find("year").value), editors = point && point.year === year ? [point.editor] : chosenEditors();
    const found = selected().filter((i) => rows.y[i] === year && editors.includes(rows.e[i]));
    const lines = found.sort((a, b) => score(a) - score(b)).map((i) => ({
      fact: factOf(i),
      cells: [prompt(i), text(rows.want[i]), text(rows.got[i]), verdict(i), data.editors[rows.e[i]], rows.s[i]],
    }));
    const names = editors.map((e) => data.editors[e]).join(", ");
    table(find("questions"), ["Question", "Target", "Answer given", "Verdict", "Editor", "Step"], lines, `${lines.length} answers of ${names} in year ${year}.`);
  }

  function life() {
    const fact = Number(find("fact").value), shown = chosenEditors();
    const found = every.filter((i) => factOf(i) === fact && shown.includes(rows.e[i]));
    const lines = found.sort((a, b) => rows.s[a] - rows.s[b] || rows.e[a] - rows.e[b]).map((i) => ({
      fact: -1,
      cells: [rows.s[i], rows.m[i] === RIGHT_AFTER ? "right after" : rows.l[i] ? "later" : "replaced since", splitOf(i), data.editors[rows.e[i]],
        prompt(i), text(rows.want[i]), text(rows.got[i]), verdict(i)],
    }));
    const said = fact < 0 ? "No fact is chosen." : `Edited at step ${data.events.step[fact]} to “${text(data.events.target[fact])}”; ${lines.length} answers.`;
    table(find("life"), ["Step", "Asked", "Split", "Editor", "Question", "Target", "Answer given", "Verdict"], lines, said);
  }

  // Edits whose own question was right right after the edit and is wrong where it was asked last while the edit was live.
  function losses() {
    const first = new Map(), last = new Map(), shown = chosenEditors();
    for (const i of every) {
      if (splitOf(i) !== "edit" || !rows.l[i] || score(i) === null || !shown.includes(rows.e[i])) continue;
      const key = rows.e[i] + " " + rows.q[i];
      if (rows.m[i] === RIGHT_AFTER) first.set(key, i);
      else if (!last.has(key) || rows.s[i] >= rows.s[last.get(key)]) last.set(key, i);
    }
    const lost = [...first].filter(([key, i]) => score(i) >= 1 && last.has(key) && score(last.get(key)) < 1).map(([key, i]) => [i, last.get(key)]);
    lost.sort((a, b) => score(a[1]) - score(b[1]) || rows.s[a[1]] - rows.s[a[0]] - (rows.s[b[1]] - rows.s[b[0]]));
    const lines = lost.map(([i, j]) => ({
      fact: factOf(i),
      cells: [prompt(i), text(rows.want[i]), text(rows.got[j]), verdict(j), data.editors[rows.e[i]], rows.s[i], rows.s[j]],
    }));
    table(find("losses"), ["Question", "Target", "Last answer", "Verdict", "Editor", "Edited", "Asked last"], lines,
      `${lines.length} ${lines.length === 1 ? "edit was" : "edits were"} right just after the step and not when last asked; the lowest scores come first.`);
  }

  function all() {
    const years = unique(selected().map((i) => rows.y[i])).sort((a, b) => a - b), before = find("year").value;
    choices(find("year"), years.map((v) => [v, v]));
    find("year").value = years.map(String).includes(before) ? before : String(years[years.length - 1]);
    point = null;
    chart(); questions(); life(); losses();
  }

  data.editors.forEach((name, e) => {
    const box = element("input", undefined, { type: "checkbox", value: e, checked: "" }), label = element("label");
    const swatch = element("i", undefined, { style: "background:" + data.colours[e] });
    label.append(box, swatch, name);
    find("editors").append(label);
  });
  const splits = unique(data.questions.split.map(text));
  choices(find("split"), splits.map((s) => [s, s.replaceAll("_", " ")]));
  find("split").value = splits.includes("edit") ? "edit" : splits[0];
  choices(find("mode"), Object.entries(data.modes));
  find("mode").value = data.mode;
  choices(find("moment"), [[AT_YEAR_END, "at the year's end"], [RIGHT_AFTER, "right after the edit"], [OTHER, "at other times"]]);
  choices(find("fact"), data.events.prompt.map((p, i) => [i, text(p) + " → " + text(data.events.target[i])]));
  root.addEventListener("change", (event) => {
    if (event.target === find("year")) { point = null; questions(); }
    else if (event.target === find("fact")) life();
    else all();
  });
  if (data.kept < data.facts) find("sample").textContent = `The run is larger than ${data.mb} MB: ${data.kept} of ${data.facts} facts and general questions, drawn with seed ${data.seed}, are here.`;
  root.hidden = false;
  all();
})();
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
