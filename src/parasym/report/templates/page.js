"use strict";
const page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // -- tables: every header sorts; numbers by value, text by name ----------------------------------------------------------------
  const valueOf = (cell) => {
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = Number(text.replace(/,/g, "").replace(/ %$/, ""));
    return text !== "" && !Number.isNaN(number) ? number : text.toLowerCase();
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : typeof a === "number" ? -1 : typeof b === "number" ? 1 : a.localeCompare(b, undefined, { numeric: true });
  function sortTable(table, column, direction) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
    rows.sort((a, b) => direction * compare(a[0], b[0]));
    body.append(...rows.map((pair) => pair[1]));
    [...table.tHead.rows[0].cells].forEach((cell, index) => cell.setAttribute("aria-sort", index !== column ? "none" : direction > 0 ? "ascending" : "descending"));
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = cell.textContent;
      button.addEventListener("click", () => sortTable(table, column, cell.getAttribute("aria-sort") === "ascending" ? -1 : 1));
      cell.replaceChildren(button);
    });
  }
  for (const input of document.querySelectorAll("input[data-filter]")) {
    const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const count = input.closest("p").querySelector(".count");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => { row.hidden = !words.every((word) => texts[index].includes(word)); shown += !row.hidden; });
      count.textContent = words.length ? `${shown} of ${rows.length}` : "";
    });
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        const range = document.createRange();
        range.selectNodeContents(code);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1600);
    });
  }

  // -- figures: a colour that starts with "--" is one of the style sheet's, so that it follows the theme -----------------------------------
  const themed = (value) => typeof value === "string" ? (value.startsWith("--") ? style(value) : value)
    : Array.isArray(value) ? (value.length > 64 ? value : value.map(themed))
    : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item)])) : value;
  function drawFigures() {
    const ink = style("--ink"), line = style("--line"), panel = style("--panel");
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
    for (const figure of data.figures) {
      const own = themed(figure.layout);
      const layout = {
        ...own, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: style("--sans"), size: 12.5 },
        margin: { l: 10, r: 16, t: 26, b: 44 }, bargap: 0.3, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal", ...own.legend },
        hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink } },
        xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis, ticksuffix: `${own.yaxis?.ticksuffix ?? ""}  ` },
        shapes: (own.shapes || []).map((shape) => ({ ...shape, line: { color: style("--bad"), ...shape.line } })),
      };
      Plotly.react(`plot-${figure.id}`, themed(figure.traces), layout, { displayModeBar: false, responsive: true });
    }
  }
  drawFigures();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawFigures);
  for (const select of document.querySelectorAll("select[data-figure]")) {
    const figure = data.figures.find((item) => item.id === select.dataset.figure);
    const first = figure.traces.map((trace) => trace.visible ?? true);
    select.addEventListener("change", () => {
      const chosen = select.value === "" ? first : select.value === "all" ? first.map(() => true) : first.map((_, index) => figure.choices[select.value].includes(index));
      figure.traces.forEach((trace, index) => { trace.visible = chosen[index]; });
      drawFigures();
    });
  }

  // -- self-check, asked for by #selftest: what a reader would do, and what came of it -----------------------------------------------
  async function selftest(more) {
    const result = { errors: [] };
    addEventListener("error", (event) => result.errors.push(String(event.message)));
    await new Promise((done) => setTimeout(done, 300));
    result.figures = [...document.querySelectorAll(".plot")].filter((plot) => plot.querySelector(".main-svg .trace, .main-svg .point")).length;
    result.figuresExpected = data.figures.length;
    const table = document.getElementById("all");
    if (table) {
      const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.dataset.check !== undefined);
      const read = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value));
      const button = table.tHead.rows[0].cells[column].querySelector("button");
      button.click();
      const up = read();
      button.click();
      const down = read();
      result.sorted = up.every((value, index) => !index || up[index - 1] <= value) && down.every((value, index) => !index || down[index - 1] >= value);
      result.ariaSort = table.tHead.rows[0].cells[column].getAttribute("aria-sort");
      const input = document.querySelector("input[data-filter=all]");
      input.value = "no such thing";
      input.dispatchEvent(new Event("input"));
      result.filtered = [...table.tBodies[0].rows].every((row) => row.hidden);
      input.value = "";
      input.dispatchEvent(new Event("input"));
    }
    more(result);
    document.documentElement.dataset.selftest = JSON.stringify(result);
  }
  return { data, style, selftest: (more) => { if (location.hash === "#selftest") selftest(more); } };
})();
