(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const errors = [];
  const note = (error) => { errors.push(String(error)); root.dataset.errors = JSON.stringify(errors); };
  addEventListener("error", (event) => note(event.message));
  addEventListener("unhandledrejection", (event) => note(event.reason));
  document.addEventListener("securitypolicyviolation", (event) => note(`${event.violatedDirective}: ${event.blockedURI}`));

  // On a phone the name of a difference takes two lines.
  const TWO_LINES = { labelFontSize: 11, labelLineHeight: 12, labelExpr: "split(replace(datum.label, ' \u2212 ', '|\u2212 '), '|')" };

  // Panels stand side by side where there is room; colours keep away from the end that the paper swallows.
  function fit(spec, width) {
    if (spec.facet) {
      const columns = width < 560 ? 1 : Math.min(spec.columns, panels(spec));
      const axes = spec.resolve?.scale?.y === "independent" ? columns : 1;
      spec.columns = columns;
      spec.spec.width = Math.floor((width - 52 * axes - 24 * (columns - 1) - 8) / columns);
    } else {
      spec.width = width - 4;
      spec.autosize = { type: "fit-x", contains: "padding" };
    }
    const narrow = width < 560;
    if (narrow && spec.layer?.some((layer) => layer.encoding?.y?.field === "contrast")) spec.height *= 1.3;
    if (narrow) spec.config.legend = { ...spec.config.legend, direction: "vertical", orient: "bottom", titleOrient: "top" };
    return JSON.parse(JSON.stringify(spec), (key, value) =>
      key === "labelLimit" && narrow ? Math.min(value, 130) :
      key === "title" && narrow && value?.length > 44 ? halves(value) :
      key === "axis" && narrow && value?.labelLimit ? { ...value, ...TWO_LINES } :
      key === "scheme" && value.name === "viridis" ? { name: "viridis", extent: dark.matches ? [0.2, 1] : [0, 0.9] } : value);
  }

  // Of a long title of an axis, two lines.
  function halves(title) {
    const at = title.indexOf(" ", title.length / 2);
    return typeof title !== "string" || at < 0 ? title : [title.slice(0, at), title.slice(at + 1)];
  }

  function panels(spec) {
    return new Set(spec.datasets[spec.data.name].map((row) => row[spec.facet.field])).size;
  }

  async function draw(figure) {
    const place = figure.querySelector(".drawing");
    const spec = JSON.parse(figure.querySelector("script").textContent);
    try {
      await vegaEmbed(place, fit(spec, place.clientWidth), {
        mode: "vega-lite", renderer: "svg", ast: true, tooltip: { theme: dark.matches ? "dark" : "light" },
        actions: false, defaultStyle: false,
      });
      figure.dataset.drawn = "yes";
    } catch (error) {
      note(error);
      place.className = "failed";
      place.textContent = `This figure could not be drawn: ${error}`;
    }
  }

  const drawAll = () => Promise.all([...document.querySelectorAll("figure")].map(draw)).then(() => { root.dataset.ready = "yes"; });
  let width = innerWidth, later;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(later);
    later = setTimeout(drawAll, 200);
  });
  dark.addEventListener("change", drawAll);

  // A click on a head sorts by it, a second one turns the order round; numbers by value, what is none last.
  function sortable(table) {
    const body = table.tBodies[0];
    if (body.rows.length < 2) return;
    [...table.tHead.rows[0].cells].forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[at].dataset.v ?? row.cells[at].textContent;
        const numeric = head.classList.contains("number");
        const sorted = [...body.rows].sort((one, two) => {
          const [a, b] = [key(one), key(two)];
          if (numeric && (a === "" || b === "")) return (a === "") - (b === "");
          const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
          return down ? -order : order;
        });
        body.append(...sorted);
      });
    });
  }
  document.querySelectorAll("table").forEach(sortable);

  let shut = [];
  addEventListener("beforeprint", () => {
    shut = [...document.querySelectorAll("main details:not([open])")];
    shut.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => shut.forEach((part) => { part.open = false; }));
  drawAll();
})();
