// The largest type, in steps of 1 %, with which a paper has room on its sheet in the font at hand.
(() => {
  const root = document.documentElement;
  const [first, last] = ["header", "footer"].map((name) => document.querySelector(`body > ${name}`));
  const ruler = document.body.appendChild(document.createElement("div"));
  const tables = [...document.querySelectorAll("table")];
  const fits = (percent) => {
    root.style.setProperty("--type", percent / 100);
    const high = last.getBoundingClientRect().bottom - first.getBoundingClientRect().top;
    return high <= ruler.getBoundingClientRect().height
      && tables.every((table) => table.offsetWidth <= table.parentElement.clientWidth + 1);
  };
  ruler.className = "ruler";
  root.classList.add("fitting");
  for (let percent = 120; percent >= 30 && !fits(percent); percent -= 1);
  root.classList.remove("fitting");
  ruler.remove();
})();
