// What every page does: buttons that copy the command beside them, and a word where something is wider than the screen.

(() => {
  "use strict";

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // no permission: leave it selected for the keyboard
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  const notes = [...document.querySelectorAll(".sideways")].map((note) => {
    const box = note.nextElementSibling;
    return [note, box.matches(".scroll") ? box : box.querySelector(".plot-scroll, .heat-scroll")];
  });
  const look = () => {
    const wide = notes.map(([, box]) => box.scrollWidth > box.clientWidth + 1); // first all that is measured
    notes.forEach(([note], i) => note.classList.toggle("needed", wide[i]));
  };
  look();
  addEventListener("resize", look);

  document.documentElement.classList.add("live"); // shows what needs scripts
})();
