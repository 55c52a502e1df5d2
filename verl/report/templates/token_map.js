"use strict";
(() => {
  const tip = document.getElementById("tip");
  const TINT = [255, 128, 0]; // over a picture in greys

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const shown = (number) => (number === null ? "undefined" : String(number));

  function draw(picture, map) {
    const size = picture.rows * picture.columns;
    const image = new ImageData(picture.columns, picture.rows);
    for (let field = 0; field < size; field += 1) {
      image.data.set(TINT, 4 * field);
      // The root shows what is looked at a little beside what is looked at most.
      image.data[4 * field + 3] = 205 * Math.sqrt(picture.levels[map * size + field] / 255);
    }
    picture.canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function pictureOf(figure, described) {
    const canvas = document.createElement("canvas");
    const [left, top, right, bottom] = described.box;
    canvas.width = described.columns;
    canvas.height = described.rows;
    canvas.style.left = 100 * left + "%";
    canvas.style.top = 100 * top + "%";
    canvas.style.width = 100 * (right - left) + "%";
    canvas.style.height = 100 * (bottom - top) + "%";
    const frame = figure.querySelector(".frame");
    frame.append(canvas);
    frame.classList.add("mapped");
    const levels = bytesOf(described.data);
    const size = described.rows * described.columns;
    return {
      ...described,
      canvas,
      levels,
      caption: figure.querySelector(".shown"),
      whole: levels.length / size - 1,
    };
  }

  function start(article) {
    const data = JSON.parse(article.querySelector('script[type="application/json"]').textContent);
    const response = article.querySelector(".response");
    const pieces = Array.from(response.querySelectorAll("span"));
    const figures = Array.from(article.querySelectorAll("figure"));
    const pictures = data.pictures.map((described, place) => pictureOf(figures[place], described));
    const places = new Map();
    let first = 0;
    for (const [number, piece] of pieces.entries()) {
      const count = Number(piece.dataset.n || 1);
      places.set(piece, { number, first, count });
      first += count;
    }
    let current = null;

    const nameOf = (token) => token + 1 + (data.gap !== null && token >= data.gap[0] ? data.gap[1] : 0);

    function numbersOf({ first, count }) {
      const of = (values) => values.slice(first, first + count).map(shown).join(", ");
      const last = first + count - 1;
      const name = count > 1 ? `tokens ${nameOf(first)} to ${nameOf(last)}` : `token ${nameOf(first)}`;
      const parts = [name, `weight ${of(data.weights)}`, `VGR ${of(data.vgr)}`];
      if (data.looks !== null) parts.push(`on images ${of(data.looks)}`);
      return parts.join(" \u00b7 ");
    }

    function show(piece) {
      if (current !== null) current.classList.remove("now");
      current = piece;
      const place = piece === null ? null : places.get(piece);
      if (piece !== null) piece.classList.add("now");
      for (const picture of pictures) {
        draw(picture, place === null ? picture.whole : Math.floor(place.first / picture.stride));
        picture.caption.textContent = place === null ? "whole response" : `token ${nameOf(place.first)}`;
      }
      tip.hidden = piece === null;
      if (piece === null) return;
      tip.textContent = numbersOf(place);
      putTip();
    }

    function putTip() {
      if (current === null) return;
      const box = current.getClientRects()[0] || current.getBoundingClientRect();
      const below = box.bottom + 8;
      const fits = below + tip.offsetHeight < window.innerHeight;
      tip.style.top = (fits ? below : box.top - tip.offsetHeight - 8) + "px";
      tip.style.left = Math.max(4, Math.min(box.left, window.innerWidth - tip.offsetWidth - 4)) + "px";
    }

    response.addEventListener("pointerover", (event) => {
      if (places.has(event.target)) show(event.target);
    });
    response.addEventListener("pointerleave", () => show(null));
    response.addEventListener("blur", () => show(null));
    response.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") show(null);
      if (step === undefined || pieces.length === 0) return;
      event.preventDefault();
      const number = current === null ? (step > 0 ? 0 : pieces.length - 1) : places.get(current).number + step;
      const next = pieces[Math.max(0, Math.min(number, pieces.length - 1))];
      next.scrollIntoView({ block: "nearest" });
      show(next);
    });
    window.addEventListener("scroll", putTip, { passive: true, capture: true });
    show(null);
  }

  for (const article of document.querySelectorAll("article.sample")) start(article);
})();
