(() => {
  // Labels, Gradio's own included, are in the language of LANGUAGES that the visitor prefers, or that of --lang.
  const forced = "%LANGUAGE%";
  const preferred = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase());
  const language = forced !== "auto" ? forced : preferred.find((tag) => ["en", "zh"].includes(tag)) ?? "en";
  const locale = language === "zh" ? "zh-CN" : "en";
  Object.defineProperty(navigator, "language", { get: () => locale });
  Object.defineProperty(navigator, "languages", { get: () => [locale] });
  document.documentElement.lang = locale;

  const box = () => document.querySelector("#question textarea");
  const isNarrow = () => window.innerWidth < 900;
  const show = (panel) => {
    document.documentElement.dataset.panel = panel;
  };

  window.medicalgpt = {
    // Open a panel, or close it if it is open.
    toggle: (panel) => show(document.documentElement.dataset.panel === panel ? "" : panel),
    // The question leaves the box when it is sent, so that what is typed from then on stays in it. While an answer is
    // coming, nothing is sent.
    take: (turns, typed, ...rest) => {
      const send = document.querySelector("#send");
      if (send.disabled || !typed.trim()) return [turns, "", ...rest];
      box().value = "";
      box().dispatchEvent(new Event("input", { bubbles: true }));
      // The program does the same a moment later, unless it cannot be reached.
      send.disabled = true;
      setTimeout(() => (send.disabled = !document.querySelector("#stop").disabled), 3000);
      return [turns, typed, ...rest];
    },
    download: (text, name) => {
      if (!text) return;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
  };
  // Before the page's viewport is known, a phone takes itself for wide.
  document.addEventListener("DOMContentLoaded", () => show(isNarrow() ? "" : "%PANEL%"));

  const showSource = (id) => {
    const source = document.getElementById(id);
    if (!source) return;
    document.querySelectorAll("#passages article").forEach((each) => (each.hidden = each !== source));
    show("passage");
    (source.querySelector("mark") ?? source).scrollIntoView({ block: "center" });
  };

  // Text in the conversation is escaped, and its citations are links; what is copied is what the model wrote.
  const plain = (text) =>
    text
      .split(/(```[^]*?(?:```|$)|`[^`\n]+`)/)
      .map((part, at) => (at % 2 ? part : part.replace(/&(lt|amp);/g, (_, name) => (name === "lt" ? "<" : "&"))))
      .join("")
      .replace(/\[\\\[(\d+)\\\]\]\(#source-[\d-]+\)/g, "[$1]");
  let ofMessage = false;
  document.addEventListener(
    "click",
    (event) => {
      ofMessage = event.target.closest(".message-buttons-left, .message-buttons-right, .message-buttons") !== null;
      const citation = event.target.closest('a[href^="#source-"]');
      if (citation) {
        event.preventDefault();
        event.stopPropagation();
        showSource(citation.hash.slice(1));
      }
    },
    true,
  );
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(ofMessage ? plain(text) : text);
  }
})();
