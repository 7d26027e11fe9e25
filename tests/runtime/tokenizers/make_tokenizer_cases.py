"""Writes the test data of tests/runtime/test_tokenizer.c beside this file: {gpt2,llama3,qwen2}/{tokenizer,cases}.json and
utf8.json. The ids and decoded texts are what the Hugging Face `tokenizers` package gives (pip install tokenizers), the
texts of utf8.json what Python's bytes.decode("utf-8", "replace") gives. Needs no other file; the same version of the
package writes the same bytes.

    python3 make_tokenizer_cases.py [--check]     --check: compare with what is there instead of writing
"""
import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).resolve().parent
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")

SENTENCES = [
    "The river had risen in the night, and in the morning the lower meadow was a lake with a fence running into it.",
    "She couldn't say why they'd come; it's what we've always done, and I'm sure you'll agree he's right.",
    "Don't, won't, can't: THEY'RE ALL CONTRACTIONS, AREN'T THEY? I'LL SAY SO, AND WE'VE HEARD IT; I'M DONE.",
    "In 1969 there were 3 of them, 12 in 1970, 4096 in 2024 and 1234567890 at the end of it, or 3.14159 percent.",
    "for (size_t i = 0; i < n_tokens; i++) {\n    if (tokens[i].id == 0)\n        return -1; // the end\n}\n",
    "def encode(self, text: str) -> list[int]:\n\treturn [self.table[b] for b in text.encode('utf-8')]\n",
    "SELECT name, COUNT(*) FROM rivers WHERE length_km >= 100 GROUP BY name ORDER BY 2 DESC;\r\n",
    "{\"key\": [1, 2, 3], \"nested\": {\"a\": null, \"b\": true}}\n\n\n  - item one\n  - item two\n\n",
    "Der Fluß war über Nacht gestiegen, und die Wiese lag wie ein großer See mit schönen, kühlen Ufern da.",
    "La rivière était montée pendant la nuit ; où l'on voyait un pré, il n'y avait plus qu'un lac très étendu.",
    "El río creció de noche; ¿quién lo habría creído? ¡Mañana será otro día, señor!",
    "Река поднялась ночью, и утром нижний луг стал озером, в которое уходила изгородь.",
    "Ο ποταμός φούσκωσε τη νύχτα και το πρωί το λιβάδι ήταν λίμνη.",
    "ارتفع النهر في الليل، وفي الصباح كان المرج بحيرة. العدد ١٢٣٤٥ صحيح.",
    "רָם הַנָּהָר בַּלַּיְלָה, וּבַבֹּקֶר הָיָה הָאָחוּ לַאֲגַם.",
    "नदी रात में चढ़ गई थी, और सुबह निचला मैदान झील बन गया था। संख्या १२३४५ है।",
    "แม่น้ำเอ่อขึ้นในตอนกลางคืน และตอนเช้าทุ่งหญ้าก็กลายเป็นทะเลสาบ ๑๒๓",
    "夜里河水涨了，早晨低处的草地变成了湖，篱笆一直伸进水里。一共有三十二棵树。",
    "夜のうちに川が増水し、朝には下の牧草地が湖になっていた。フェンスが水の中へ続いている。",
    "밤사이 강물이 불어나 아침에는 아래쪽 풀밭이 호수가 되어 있었다. 울타리가 물속으로 이어졌다.",
    "Đêm qua nước sông dâng cao, sáng ra bãi cỏ thấp đã thành hồ. Tiếng Việt có nhiều dấu.",
    "👍 great 🎉🎉 the family 👨‍👩‍👧‍👦 went to 🇫🇷 with ❤️ and ☕️, said 🤷🏽‍♀️.",
    "x² + y² = z², ∑ᵢ aᵢ ≤ ∞, α → β, ½ of Ⅳ; “quoted” — dashes – and … dots",
]


def corpus():
    """The sentences, and enough recombinations of their words for a few hundred merges to be worth learning."""
    rng = random.Random(1)
    words = [w for s in SENTENCES for w in s.split()]
    lines = SENTENCES * 6
    for _ in range(400):
        lines.append(" ".join(rng.choice(words) for _ in range(rng.randint(3, 14))))
    for _ in range(120):
        lines.append("\n".join(" " * rng.choice([0, 2, 4, 8]) + rng.choice(words) for _ in range(4)) + "\n")
        lines.append(" ".join(str(rng.randint(0, 10 ** rng.randint(1, 9))) for _ in range(6)))
    return lines


def added(name):
    """Added tokens that exercise every flag; the ordinary ones are looked for in normalized text."""
    special = [
        AddedToken("<|begin_of_text|>", special=True, normalized=False),
        AddedToken("<|end_of_text|>", special=True, normalized=False),
        AddedToken("<|eot|>", special=True, normalized=False),
        AddedToken("<|eot|>more", special=True, normalized=False),
        AddedToken("<mask>", special=True, normalized=False, lstrip=True),
        AddedToken("<fim>", special=True, normalized=False, rstrip=True),
        AddedToken("<both>", special=True, normalized=False, lstrip=True, rstrip=True),
        AddedToken("<｜sep▁｜>", special=True, normalized=False),
    ]
    ordinary = [
        AddedToken("<think>", normalized=False),
        AddedToken("</think>", normalized=False),
        AddedToken("word", single_word=True),
        AddedToken("+++", single_word=True, normalized=False),
        AddedToken("Tessera", normalized=True),
        AddedToken("Tesserae", normalized=True),
        AddedToken("caf\u00e9 cr\u00e8me", normalized=True),
        AddedToken("A\u030angstrom", normalized=True),
        AddedToken("    indent", normalized=False, rstrip=True),
        AddedToken("naïve", normalized=True),
    ]
    if name == "gpt2":
        ordinary.append(AddedToken("hold", single_word=True, lstrip=True, rstrip=True))
    return special, ordinary


def build(name):
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if name == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3 if name == "llama3" else QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = {"gpt2": 700, "llama3": 850, "qwen2": 800}[name]
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False,
        special_tokens=["<|endoftext|>"] if name == "gpt2" else []))
    if name == "llama3":
        # Whole words that the merges do not lead to: only ignore_merges finds them.
        data = json.loads(tokenizer.to_str())
        vocab = data["model"]["vocab"]
        for word in ["Ġhippopotamus", "ĠâĪŀ", "quixotic", "Ċ" * 7, "zz"]:
            vocab[word] = len(vocab)
        tokenizer = Tokenizer.from_str(json.dumps(data))
    special, ordinary = added(name)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(ordinary)
    begin, end = ("<|begin_of_text|>", "<|end_of_text|>")
    template = processors.TemplateProcessing(
        single=f"{begin} $A" + (f" {end}" if name == "qwen2" else ""), pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (begin, end)])
    if name == "llama3":
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    elif name == "qwen2":
        tokenizer.post_processor = template
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def as_written(tokenizer, name):
    """tokenizer.json, with merges in the older spelling ("a b") for gpt2, whose files also lack some keys."""
    data = json.loads(tokenizer.to_str())
    if name == "gpt2":
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        data["model"]["continuing_subword_prefix"] = data["model"]["end_of_word_suffix"] = ""
        for key in ("type", "byte_fallback", "ignore_merges"):
            del data["model"][key]
        del data["pre_tokenizer"]["use_regex"]
    return data


SPACES = ["\t", "\n", "\v", "\f", "\r", " ", "\x85", "\xa0", "\u1680", "\u180e", "\u2000", "\u2003", "\u200a", "\u200b",
          "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff"]


def texts():
    out = ["", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\t", "\t\t", " \n", "\n ", " \n ", "a", " a", "a ", "  a", "a  ", "   a   b   ",
           "a\n", "a\n\n\nb", "a \n \n b", "a\r\nb\r\n\r\n  c\r\n", "\ta\t\tb\t", "a \t \t b", "x\n\t\ty", "end.   ", "end.\n   ",
           " \r\n \r\n\t", "\n\n\n\n\n\n\n", "\n" * 7 + "x"]
    out += SENTENCES
    for c in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]:
        out += [f"it{c}", f"IT{c.upper()} X", f"it {c} x", f"{c}{c.upper()}tail", f"’{c[1:]}", f"9{c}9", c.title()]
    out += ["'ſ", "it'ſ", "IT'LL'VE", "'lL'Ll", "'", "''s''", "rock'n'roll o'clock 'tis"]
    out += ["1", "12", "123", "1234", "12345", "1234567890" * 7, "1,234,567.89", "x1y22z333w4444", "3rd 4th", "v1.2.3-rc4", "0x7fff", "١٢٣٤٥٦٧",
            "१२३४ ५", "๑๒๓๔", "ⅣⅤ ½¾ ²³", "１２３４", "𝟏𝟐𝟑𝟒", "1 2  3   4", "12\u0301 3"]
    out += ["👍", "👍🏽", "👨‍👩‍👧‍👦", "👨‍👩‍👧‍👦👨‍👩‍👧‍👦 x", "🇫🇷🇩🇪", "❤️", "1️⃣2️⃣", "a👍b", " 👍 ", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
    out += ["e\u0301", "é", "cafe\u0301 au lait", "a\u0323\u0307 a\u0307\u0323", "\u0301", " \u0301x", "n\u0303o\u0308", "Å A\u030a \u212b", "\u1100\u1161\u11a8 각",
            "\u1e9b\u0323", "\u0344", "\u0958 क\u093c", "\u2126 Ω", "ﬁ ﬃ", "\uf900 豈", "Z\u0335\u0321\u0322\u0301\u030aalgo", "Việt Vie\u0302\u0323t Vie\u0323\u0302t",
            "q\u0307\u0323", "\u0f73\u0f71", "\U0001d15e", "\u1ea5\u0323", "ed\u0301\u0327"]
    out += ["नमस्ते दुनिया", "ภาษาไทย", "العَرَبِيَّة", "עִבְרִית", "中文，標點。「引號」", "日本語テキスト ﾊﾝｶｸ", "한국어 조선말", "ქართული", "ᠮᠣᠩᠭᠣᠯ\u180eᠠ",
            "தமிழ் எழுத்து", "ትግርኛ", "mixed中文and日本語text", "Ωmega ΩMEGA", "ß ẞ ſ", "İıIi", "ǅ ǈ", "\U00010400\U00010428", "\U0001F1E6", "\ue000\uf8ff", "\U000e0001", "\U0010ffff"]
    out += ["\x01\x02\x03", "a\x01b", "\x7f", "\x1b[31mred\x1b[0m", "\x08\x08", "\x1c\x1d\x1e\x1f", "a\x1cb\x1fc", "\x80\x9f", "\ufffd", "\ufffe", "\u200e\u200f"]
    out += [f"a{s}b" for s in SPACES] + [f"a{s}{s} b {s}" for s in SPACES]
    out += ["".join(SPACES), " ".join(SPACES)]
    out += ["a" * 300, "ab" * 200, "abc" * 500, "the" * 150, "ththththe" * 40, "é" * 120, "中" * 100, "." * 100, "=" * 64 + "\n", "!?" * 30 + "\r\n\r\n", " " * 200, " " * 200 + "x",
            "\n" * 64, "\t" * 33 + "x", "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft", "a_b_c__d", "/usr/local/lib/libfoo.so.1",
            "https://example.org/a?b=c&d=%20#e", "user@example.org", "<html><body class=\"x\">&amp;</body></html>", "$x = @{$y}->[0];", "a/b\\c|d", "((([[[{{{}}}]]])))",
            "C'est l'été", "--flag=value -x", "#!/bin/sh\n", "// comment\n/* and */", "`code` **bold** _it_", "a…b—c–d", "“x”‘y’", "€5 £6 ¥7 ₹8", "±≤≥≠", "α+β"]
    out += [" hippopotamus", "hippopotamus", " hippopotami", "quixotic", " quixotic", "quixotically", "x ∞ y", "zz", "zzz", "pizzazz zz"]
    a = "<|begin_of_text|>"
    out += [a, a + a, f"x{a}y", f" {a} ", f"{a}\n", "<|eot|>", "<|eot|>more", "<|eot|>mor", "x<|eot|>morey", "<|eot|><|eot|>more<|eot|>", "<|eot", "<|eot|", "<<|eot|>>", "<|EOT|>",
            "<|endoftext|>", "a<|endoftext|>b", "a <mask> b", "a   <mask>   b", "<mask>", "  <mask>", "<mask>  ", "a\n\t\u3000<mask>b", "<mask><mask>", "<mask> <mask>",
            "a <fim> b", "a<fim>  \n b", "<fim>", "<fim>   ", "<fim> <fim> x", "a  <both>  b", "<both><both>", "x <both> <both> y", "  <both>  ", "<fim>  <mask>", "<fim>  <both>  <mask> z",
            "<fim>     indent x", "<both>    indent  y", "    indent  x", "a    indent\n\tb", "     indent", "<｜sep▁｜>", "a<｜sep▁｜>b <｜sep▁|>",
            "<think>hm</think>ok", "<think><think>", "< think>", "<|unknown|>", "\u180e<mask>\u180e", "\u200b<both>\u200b", "\xa0<both>\xa0", "\x85<both>\x1f", "\x1f<both>\x1c"]
    for t in ["word", "+++"]:
        out += [t, f"a {t} b", f"a{t}", f"{t}s", f"{t}_", f"_{t}", f"{t}.", f"({t})", f"é{t}", f"{t}é", f"{t}\u0301", f"{t}\u200d", f"{t}中", f"{t}1", f"{t}Ⓐ", f"{t}²", f"{t}👍",
                f"{t}{t}", f"{t} {t}", f"\n{t}\t{t}\r\n", f"<think>{t}</think>", f"<|eot|>{t}<|eot|>x", f"{t}‿", f"{t}Ⅳ", f"{t}\u20dd"]
    out += ["Tessera", "Tesserae", "tessera", "xTesserax", "TesseraTesserae", "Tesser", "caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me", "un caf\u00e9 cre\u0300me!", "A\u030angstrom", "\u00c5ngstrom",
            "\u212bngstrom", "naïve", "nai\u0308ve", "a naïve b", "hold", "a hold b", "  hold  ", "ahold", "hold on  hold", "(hold)"]
    rng = random.Random(7)
    atoms = (SPACES + list("aZ9'.,!<>|_-é中👍नم") + ["\u0301", "\u0323", "\u200d", "'S", "'ll", "123", "the ", " and", "\r\n", "   ", "<|eot|>", "<mask>", "<fim>", "<both>", "word",
             "Tessera", "<think>", "e\u0301", "\u1100\u1161", "+++"])
    for _ in range(160):
        out.append("".join(rng.choice(atoms) for _ in range(rng.randint(2, 24))))
    letters = "etaoinshrdlu"
    for _ in range(30):
        out.append("".join(rng.choice(letters) for _ in range(rng.randint(10, 120))))
    return list(dict.fromkeys(out))


def cases(tokenizer):
    """One list a case: [text, ids] or, where decoding the ids gives another text, [text, ids, decoded]."""
    out = []
    # An added token is decoded as its content here; the package would take the ï of "naïve" for a raw byte.
    raw = {a["id"]: a["content"] for a in json.loads(tokenizer.to_str())["added_tokens"]}
    for text in texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = "".join(decode(tokenizer, ids, raw))
        out.append([text, ids] if decoded == text else [text, ids, decoded])
    return out


def decode(tokenizer, ids, raw):
    run = []
    for i in ids:
        if i in raw:
            yield tokenizer.decode(run, skip_special_tokens=False) + raw[i]
            run = []
        else:
            run.append(i)
    yield tokenizer.decode(run, skip_special_tokens=False)


def utf8_cases():
    rng = random.Random(3)
    good = ["a", "é", "ß", "中", "\u0800", "\ud7ff", "\ue000", "\uffff", "👍", "\U00010000", "\U0010ffff"]
    edge = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    out = [b"", b"\xf0\x9f\x91", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe0\x9f\xbf", b"\xf4\x90\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xe2\x28\xa1", b"\xf0\x9f\x91\xe4\xb8\xad", b"\xe4\xb8"]
    out += [bytes([a, b]) for a in edge[9:] for b in edge]
    out += [bytes(rng.choice(edge) for _ in range(rng.randint(1, 12))) for _ in range(400)]
    for _ in range(200):
        b = bytearray("".join(rng.choice(good) for _ in range(8)).encode())
        for _ in range(rng.randint(0, 2)):
            b[rng.randrange(len(b))] = rng.choice(edge)
        out.append(bytes(b[rng.randint(0, 2):len(b) - rng.randint(0, 2)]))
    return [[b.hex(), b.decode("utf-8", "replace").encode().hex()] for b in dict.fromkeys(out)]


def dump(value):
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("],[\"", "],\n[\"") + "\n"


def main():
    files = {"utf8.json": dump(utf8_cases())}
    for name in ("gpt2", "llama3", "qwen2"):
        data = as_written(build(name), name)
        tokenizer = Tokenizer.from_str(json.dumps(data))
        framed = [[t, tokenizer.encode(t).ids] for t in ["", "x", "Hello there", "<|eot|>", " a\n"]]
        files[f"{name}/tokenizer.json"] = json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"
        files[f"{name}/cases.json"] = dump({"framed": framed, "cases": cases(tokenizer)})
    stale = [f for f, text in files.items() if not (HERE / f).exists() or (HERE / f).read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"differ: {stale}" if stale else 0)
    for f, text in files.items():
        (HERE / f).parent.mkdir(exist_ok=True)
        (HERE / f).write_text(text)
    print({f: len(text.encode()) for f, text in files.items()}, "cases:", len(texts()))


if __name__ == "__main__":
    main()
