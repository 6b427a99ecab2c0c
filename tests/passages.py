"""A few passages of two documents, in two languages."""

from medicalgpt.rag.retrieval import Passage

ILLNESSES = [
    Passage("a.md", "感冒多由病毒引起，一般一周内自己好转。", ("感冒",)),
    Passage("a.md", "胰岛素开封后在室温下可放 28 天。", ("糖尿病",)),
    Passage("b.pdf", "Ibuprofen can raise blood pressure and strain the kidneys.", (), 2),
    Passage("b.pdf", "Stitches of the face come out after 3 to 5 days.", (), 3),
]
