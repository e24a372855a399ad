"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);

  const theme = one("#theme"), root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  name();

  for (const chart of all(".chart")) {
    const area = one(".area", chart), readout = one(".readout", chart), cursor = one(".cursor", chart);
    const dots = all(".dot", chart), places = [...new Set(dots.map(d => +d.dataset.x))].sort((a, b) => a - b);
    let at = places.indexOf(0.5);
    const show = i => {
      at = Math.max(0, Math.min(places.length - 1, i));
      const here = dots.filter(d => +d.dataset.x === places[at]);
      dots.forEach(d => d.classList.toggle("on", here.includes(d)));
      cursor.hidden = false;
      cursor.style.left = 100 * places[at] + "%";
      readout.textContent = `${Math.round(100 * places[at])} % of B: ` + here.map(d => `${d.dataset.name} ${d.dataset.y}`).join(", ");
    };
    area.tabIndex = 0;
    area.setAttribute("role", "slider");
    area.setAttribute("aria-label", `${chart.dataset.title} from A to B; the arrow keys read the points`);
    area.setAttribute("aria-valuemin", 0);
    area.setAttribute("aria-valuemax", 100);
    const say = () => { area.setAttribute("aria-valuenow", Math.round(100 * places[at])); area.setAttribute("aria-valuetext", readout.textContent); };
    area.setAttribute("aria-valuenow", 50);
    area.parentElement.removeAttribute("role");
    const told = area.parentElement.getAttribute("aria-label");
    area.parentElement.removeAttribute("aria-label");
    area.setAttribute("aria-valuetext", told);
    area.addEventListener("pointermove", event => {
      const box = area.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
      show(places.reduce((best, p, i) => Math.abs(p - x) < Math.abs(places[best] - x) ? i : best, 0));
    });
    area.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -99, End: 99 }[event.key];
      if (step) { show(at + step); say(); event.preventDefault(); }
    });
  }

  const spaces = all(".space"), detail = one("#detail");
  if (!spaces.length) return;
  const filters = all(".filter"), search = one("#search"), count = one("#shown");
  const visible = () => spaces.filter(s => !s.classList.contains("gone"));
  const choose = space => {
    spaces.forEach(s => { s.toggleAttribute("aria-current", false); s.tabIndex = s === space ? 0 : -1; });
    space.setAttribute("aria-current", "true");
    all("article", detail).forEach(a => { a.hidden = a.id !== "d-" + space.dataset.id; });
    one(".hint", detail).hidden = true;
  };
  const filter = () => {
    const kinds = new Set(filters.filter(f => f.getAttribute("aria-pressed") === "true").map(f => f.dataset.kind));
    const word = search.value.trim().toLowerCase();
    spaces.forEach(s => s.classList.toggle("gone", !kinds.has(s.dataset.kind) || !s.dataset.name.includes(word)));
    const left = visible();
    count.textContent = `${left.length} of ${spaces.length} shown`;
    if (left.length && !left.some(s => s.tabIndex === 0)) spaces.forEach(s => { s.tabIndex = s === left[0] ? 0 : -1; });
  };
  filters.forEach(f => f.addEventListener("click", () => {
    f.setAttribute("aria-pressed", f.getAttribute("aria-pressed") !== "true");
    filter();
  }));
  search.addEventListener("input", filter);
  search.addEventListener("keydown", event => { if (event.key === "Escape") { search.value = ""; filter(); } });
  spaces.forEach((space, i) => {
    space.tabIndex = i ? -1 : 0;
    for (const kind of ["focus", "click", "pointerenter"]) space.addEventListener(kind, () => choose(space));
    space.addEventListener("keydown", event => {
      const left = visible(), here = left.indexOf(space);
      const to = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: left.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = left[Math.max(0, Math.min(left.length - 1, to))];
      next.focus();
      choose(next);
    });
  });
  filter();
})();
