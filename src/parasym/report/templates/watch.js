page.selftest((result) => {
  const select = document.querySelector("select[data-figure]");
  if (!select) return;
  const plot = document.getElementById(`plot-${select.dataset.figure}`);
  const drawn = () => plot.data.filter((trace) => trace.visible !== false).length;
  const choose = (value) => { select.value = value; select.dispatchEvent(new Event("change")); return drawn(); };
  result.linesAtFirst = drawn();
  result.linesOfOne = choose("0");
  result.linesOfAll = choose("all");
  result.linesAgain = choose("");
});
