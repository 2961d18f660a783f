"""Texts on which tokenizers disagree: the fixed texts of gate G5, many scripts, white space, digits, code, emoji."""

from __future__ import annotations

from qalora_export.verify.probes.text import EDGE_TEXTS, LONG_TEXT, TEXTS

# Article 1 of the Universal Declaration of Human Rights, its first sentence or near it.
SCRIPTS = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Größe, Übermaß, STRASSE, ÄÖÜ.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. L'été, ÉCOLE, ÇA, l’œuvre.",
    "Spanish": "¿Todos los seres humanos nacen libres? ¡Sí! El niño comió piñas en la mañana.",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi. Zażółć gęślą jaźń, ŁÓDŹ.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İSTANBUL'da ığdır.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm.",
    "Russian": "Все люди рождаются свободными и равными. МОСКВА, ВКонтакте, ГосДума, iPhone15Про.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι. ΑΘΗΝΑ, ΟικοΣύστημα.",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։",
    "Hebrew": "כל בני האדם נולדו בני חורין. בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة. الْحَمْدُ لِلَّهِ ١٢٣٤",
    "Persian": "تمام افراد بشر آزاد به دنیا می‌آیند ۱۲۳۴۵.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। १२३",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "Telugu": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులు.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์ ๑๒๓",
    "Khmer": "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព។",
    "Burmese": "လူတိုင်းသည် တူညီလွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားလာသူများ ဖြစ်သည်။",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ㅋㅋㅋ",
    "Japanese": "すべての人間は、生れながらにして自由であり、ﾊﾝｶｸ、１２３、「カッコ」ーー。",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。我在apple工作1314151天～《书》！",
    "Amharic": "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
    "Mongolian": "Хүн бүр төрж мэндлэхдээ эрх чөлөөтэй, адилхан нэр төртэй.",
}
MIXED = (
    *(" " * n + "x" for n in range(1, 34)),
    *("\n" * n for n in range(1, 18)),
    *("\t" * n + "y" for n in range(1, 9)),
    " \n\n \t\r\n x \n",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    *("7" * n for n in range(1, 13)),
    "1,234,567.89 0x1F 1e10 2nd 3.14.15 ½ ² Ⅷ ①②③ 12½34",
    "camelCaseXMLHttpRequest ABCDef aBC iPhone éÉéÉ ÀÉcole NASAs",
    "I'M I'm I'd'Ve 'tis ''' '''' \"\"\"\" rock'n'roll O’Neill ſ 'ſ",
    "a.b,c;d:e!f?g(h)i[j]k{l}m<n>o=p+q-r*s/t\\u|v&w^x~y`z@#$%",
    "......!!!!!!?????? ======------ ///*** >>><<< ~~~```",
    'for (int i=0;i<10;++i){\n\tprintf("%d\\n", i);\n}\n\n\n// done\r\n',
    '<html><body class="a">\n  <p>x</p>\n</body></html>',
    "SELECT * FROM t WHERE a >= 1 AND b != '';--",
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 👨‍👩‍👧 🇩🇪🇫🇷 👍🏽👍🏿 ❤️‍🔥 ☃ ☃️",
    "$1 €2 £3 ¥4 ₹5 ¢6 ±7 ×8 ÷9 §10 ©®™ °C µm Å",
    "→⇒∀∂∈ℝ∧∪≡∞ √2 ∑ᵢ xⁿ x₁ 𝔘𝔫𝔦 𝒜",
    "\u00a0\u2003\u200b\u200c\u200d\u2060\ufeff\u3000\u0085\u2028x\u2029",
    "\x00\x01\x02\x7f\x80\x9f",
    "\ue000\uf8ff\U000f0000\U0010ffff \ufffd \ufffe",
    "▁ ▁▁ a▁b ▁Hello",
    "<s>a</s> b <unk> c<pad>d <bos>x<eos> <mask>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|eot_id|>",
    "[INST] a [/INST] b[TOOL_CALLS]",
    "<0x0A><0x41> <unused7> [PAD3] <start_of_turn>user\nx<end_of_turn>",
    "x" * 300,
    "ab" * 150,
    "word " * 60,
)
# Changed by NFC: a tokenizer that normalizes and a runtime that does not differ on these by design.
DECOMPOSED = ("cafe\u0301", "A\u030angstro\u0308m", "\u1112\u1161\u11ab", "\u212b \u2126 \u212a", "e\u0301\u0323")

CORPUS: tuple[str, ...] = tuple(
    dict.fromkeys((*TEXTS, *EDGE_TEXTS.values(), LONG_TEXT * 4, *SCRIPTS.values(), *MIXED, *DECOMPOSED))
)
