// SPDX-License-Identifier: Apache-2.0
// The slider, the choice of a layer, and the button that copies. Text is only ever set as text.
"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("frames").textContent);

  function place(line, frame) {
    const [kind, low, high, left, right] = line.dataset.axis.split(" ");
    const bend = kind === "log" ? Math.log10 : (value) => value;
    const value = frame.at[line.dataset.track];
    const share = (bend(value) - bend(+low)) / (bend(+high) - bend(+low));
    const shown = value !== null && share >= 0 && share <= 1;
    line.setAttribute("visibility", shown ? "visible" : "hidden");
    if (shown) {
      const x = String(+left + share * (right - left));
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
  }

  function explore(box) {
    const run = runs[box.dataset.run];
    const slider = box.querySelector("input[type=range]");
    const fields = [...box.querySelectorAll("[data-field]")];
    const rows = [...box.querySelectorAll("[data-layer]")];
    const pointers = [...document.querySelectorAll(`.now[data-of="r${box.dataset.run}"]`)];
    const status = box.querySelector("[data-status]");

    function show() {
      const frame = run.frames[slider.value];
      for (const field of fields) field.textContent = frame.shown[field.dataset.field];
      rows.forEach((row, i) => {
        const [alive, total] = [frame.alive[i], run.totals[i]];
        row.querySelector("[data-bar]").setAttribute("width", String((100 * alive) / (total || 1)));
        row.querySelector("[data-count]").textContent = `${alive.toLocaleString("en")} of ${total.toLocaleString("en")}`;
      });
      slider.setAttribute("aria-valuetext", frame.said);
      for (const line of pointers) place(line, frame);
      status.textContent = "";
    }

    async function copy() {
      const code = box.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        status.textContent = "Copied.";
      } catch {
        getSelection().selectAllChildren(code);
        status.textContent = "Selected: copy it with the keyboard.";
      }
    }

    slider.addEventListener("input", show);
    box.querySelector("[data-copy]").addEventListener("click", copy);
    slider.value = slider.max; // a reload may have kept another
    show();
  }

  function choose(select) {
    const figures = [...select.options].map((option) => document.getElementById(option.value));
    function show() {
      figures.forEach((figure, i) => {
        figure.hidden = i !== select.selectedIndex;
      });
    }
    select.selectedIndex = 0;
    select.closest(".pick").hidden = false;
    select.addEventListener("change", show);
    show();
  }

  document.querySelectorAll("[data-run]").forEach(explore);
  document.querySelectorAll("[data-choose]").forEach(choose);
})();
