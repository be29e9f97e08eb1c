"use strict";
// Sliders: each shows one of the pictures that lie in it; "together" moves all to the nearest step.
const figures = [...document.querySelectorAll("[data-slides]")];
const sliders = figures.filter((figure) => figure.querySelector("input")).map((figure) => {
  const input = figure.querySelector("input");
  const frames = [...figure.querySelectorAll("[data-step]")];
  const steps = frames.map((frame) => Number(frame.dataset.step));
  const show = (place) => {
    input.value = place;
    frames.forEach((frame, number) => { frame.hidden = number !== place; });
    const text = "after step " + steps[place].toLocaleString("en");
    figure.querySelector("output").textContent = text;
    input.setAttribute("aria-valuetext", text);
  };
  return { input, steps, show };
});
const together = document.getElementById("together");
for (const slider of sliders) {
  slider.input.addEventListener("input", () => {
    const place = Number(slider.input.value);
    slider.show(place);
    if (!together || !together.checked) return;
    const step = slider.steps[place];
    for (const other of sliders) {
      if (other === slider) continue;
      const distance = (n) => Math.abs(other.steps[n] - step);
      let nearest = 0;
      other.steps.forEach((_, n) => { if (distance(n) < distance(nearest)) nearest = n; });
      other.show(nearest);
    }
  });
}
// The filter of contact sheets: cards that have the text, in the bucket.
const cards = [...document.querySelectorAll("[data-text]")];
const text = document.getElementById("filter-text");
const bucket = document.getElementById("filter-bucket");
const shown = document.getElementById("filter-shown");
if (text && bucket) {
  const apply = () => {
    const wanted = text.value.trim().toLowerCase();
    let count = 0;
    for (const card of cards) {
      const fits = card.dataset.text.includes(wanted)
        && (!bucket.value || card.dataset.bucket === bucket.value);
      card.hidden = !fits;
      count += fits ? 1 : 0;
    }
    for (const sheet of document.querySelectorAll("[data-sheet]")) {
      sheet.hidden = !sheet.querySelector("[data-text]:not([hidden])");
    }
    shown.textContent = count + " of " + cards.length + " shown";
  };
  text.addEventListener("input", apply);
  bucket.addEventListener("change", apply);
  document.getElementById("filter").hidden = false;
}
