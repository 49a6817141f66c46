// Applies the chosen colours before anything is drawn.
(() => {
  "use strict";
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* pages from a folder may have no storage */ }
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.classList.toggle("dark", dark);
})();
