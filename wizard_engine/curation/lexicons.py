"""Word lists behind the attribute heuristics, in English, Spanish and Chinese: data only.

attributes.py says how each is used. TOPICS and STOP_WORDS are words separated by blanks; the others are regular
expressions, one alternative a line, matched without regard to case.
"""

# A Latin-script keyword is a whole word, singular or plural; a CJK keyword is a substring.
TOPICS: dict[str, str] = {
    "market": """
        market shop store price cost buy bought sell sold sale dollar cent coin money cash spend spent pay
        paid discount customer purchase apple orange banana pear lemon mercado tienda precio compra comprar
        vende vender venta dinero moneda manzana naranja pera limón plátano cuesta 价格 购买 商店 超市 打折
        购物 便宜 hat sombrero limones bag bolsa bolsas
    """,
    "school": """
        school student teacher class classroom homework exam grade pencil crayon eraser notebook university
        college lesson course education learning marker ruler escuela colegio alumno alumna maestro clase
        lápiz cuaderno goma tarea regla tiza chalk 学校 学生 老师 教育 课程 教师 大学 学习 考试 教学
        crayones reglas lápices
    """,
    "farm": """
        farm farmer cow chicken hen sheep goat horse pig barn tractor crop harvest field agriculture
        livestock acre hay duck granja granjero vaca gallina oveja cabra caballo cerdo pato cosecha huevo
        农场 农业 农民 牲畜 rabbit conejo raise corral corrales cría
    """,
    "kitchen": """
        kitchen cook cooking recipe bake baking cake cookie bread pizza soup sauce flour sugar butter cup
        spoon bowl dish meal dinner lunch breakfast ingredient restaurant food chef egg cheese chocolate
        oven plate pancake muffin cocina receta galleta pastel pan taza cuchara plato tazón comida cocinar
        vegetarian vegan salad crepe cocktail sandwich diet 食物 食谱 烹饪 菜谱 餐厅 美食 蛋糕 早餐 晚餐
        饮食 菜 食材 蔬菜 餐 roll pie tray panes pasteles tarta bandeja hornea hornear
    """,
    "library": """
        library librarian book novel author chapter page shelf magazine read reading publish publisher
        literature biblioteca libro novela revista estante página leer mapa cómic comic 图书馆 书籍 小说
        作者 阅读 文学 一本书 章节 map borrow return shelves libros toma devuelve
    """,
    "sports": """
        sport game team player ball goal score match coach football soccer basketball tennis baseball swim
        swimming race runner marathon athlete olympic gym exercise workout medal bat deporte equipo jugador
        pelota balón partido entrenador carrera medalla raqueta racket 运动 体育 球队 比赛 足球 篮球 锻炼
        健身 cap card cromo gorra paquete win gana
    """,
    "travel": """
        travel trip tour tourist tourism hotel flight airport plane train bus drive mile kilometer km
        luggage suitcase ticket vacation destination visit road highway viaje viajar maleta boleto billete
        tren avión autobús postal postcard souvenir turista vacaciones 旅行 旅游 酒店 机场 航班 景点 度假
        目的地 出行 stamp coin shell collect mail sello moneda postales concha junta envía álbumes album
    """,
    "garden": """
        garden gardener flower rose tulip plant seed tree bush lawn soil pot shovel jardín jardinero flor
        rosas tulipán planta semilla árbol maceta pala daisy lily 花园 植物 种植 花朵 园艺 树木 row lilies
        daisies lirio margarita corta fila
    """,
    "business": """
        business company marketing brand product customer employee manager startup investment investor
        stock finance financial budget bank loan interest tax economy economic profit revenue sales salary
        job interview resume career advertising advertisement strategy entrepreneur supply inflation
        currency exchange tip bill empresa negocio inversión banco impuesto economía salario empleo 公司
        企业 营销 产品 投资 经济 金融 市场 客户 品牌 商业 员工 银行 广告 面试 工作 职业 财务 货币
    """,
    "technology": """
        technology computer internet software hardware website web online app device phone smartphone robot
        artificial intelligence ai machine data cloud network security blockchain digital server password
        email tecnología computadora ordenador teléfono 技术 计算机 互联网 软件 网站 人工智能 机器学习 数据
        网络 手机 电脑 科技 数字
    """,
    "programming": """
        python java javascript sql html css code coding programming program function array string variable
        loop algorithm compiler database query api json regex debug class method git linux programa código
        función 代码 编程 程序 函数 算法 变量 数组 数据库
    """,
    "mathematics": """
        math mathematics equation algebra geometry triangle rectangle circle radius angle polynomial
        derivative integral theorem probability fraction sum product quotient prime matrix vector calculate
        compute integer area perimeter volume square root matemáticas ecuación triángulo 数学 方程 三角形
        几何 概率 计算 面积 分数 公式
    """,
    "science": """
        science scientist physics chemistry biology atom molecule chemical energy force gravity light
        electron cell dna gene protein experiment theory planet star space solar moon temperature acid gas
        evolution quantum ciencia física química biología energía célula planeta 科学 物理 化学 生物 原子
        分子 能量 细胞 行星 太阳 宇宙 实验 理论 反应
    """,
    "health": """
        health healthy doctor hospital disease medicine medical patient symptom treatment vaccine virus
        brain heart blood sleep stress anxiety depression mental therapy weight pain nutrition vitamin
        salud médico enfermedad paciente 健康 医生 疾病 医疗 病人 治疗 症状 药 睡眠 压力 心理 病毒 维生素
    """,
    "nature": """
        nature animal bird fish dog cat lion tiger elephant forest river ocean sea lake mountain climate
        weather rain environment environmental pollution carbon ecosystem species wildlife recycle
        sustainability earth water naturaleza perro gato bosque río clima 自然 动物 森林 海洋 气候 环境
        污染 物种 天气 地球 生态 狗 猫 鸟 鱼 环保
    """,
    "arts": """
        art artist music song film movie painting poem poetry haiku dance theater actor singer band album
        concert drawing photo photography design fashion character plot story arte música canción película
        poema pintura cuento 艺术 音乐 电影 歌曲 绘画 诗 画 歌词 故事 角色 设计 演员 时尚 小说家
    """,
    "history": """
        history historical war ancient century empire king queen revolution president civilization medieval
        emperor independence battle treaty historia guerra imperio rey reina 历史 战争 古代 帝国 革命 总统
        世纪 皇帝 朝代
    """,
    "society": """
        society social government political politics law legal right human culture cultural religion policy
        election vote democracy gender justice community people country city population state capital
        sociedad gobierno ley cultura país ciudad 社会 政府 政治 法律 文化 宗教 政策 民主 国家 城市 权利
        人口 社区
    """,
    "language": """
        sentence word grammar verb noun adjective adverb tense synonym antonym spelling punctuation
        paragraph phrase vocabulary translate translation english spanish french metaphor simile idiom
        preposition pronoun clause passive oración palabra verbo 句子 单词 语法 动词 名词 形容词 同义词
        反义词 标点 段落 翻译 词语 词汇 短语 英语 成语
    """,
    "people": """
        friend family mother father mom dad parent child children sister brother son daughter wife husband
        aunt uncle grandmother grandfather birthday party gift wedding toy neighbor relationship feeling
        emotion advice familia amigo amiga madre padre hermano hermana cumpleaños regalo 朋友 家庭 家人
        父母 孩子 生日 礼物 婚礼 关系 情感 情绪 同事
    """,
}

_MAKE = "write|compose|draft|tell (?:me |us )?a|make up|invent|create|generate|produce|craft|construct|formulate"
_WORKS = (
    "story|poem|essay|letter|e-?mail|haiku|song|lyrics|speech|article|blog|post|paragraph|sentence|dialogue|script|review|"
    "tweet|headline|slogan|description|limerick|ad|advertisement|joke|conversation|title|report|message|text|tagline|"
    "metaphor|analogy|simile|riddle|caption|sonnet|bio|biography|statement|proposal|tale|question|phrase"
)

# The first entry that matches the first user turn is the skill; "math" is decided by attributes.math_kind.
SKILLS: dict[str, str] = {
    "translation": r"""
        \btranslat
        \b(?:in)?to (?:french|spanish|german|italian|chinese|japanese|english|portuguese|russian|arabic|korean)\b
        \btradu[cz]
        翻译|译成|译为
    """,
    "code": r"""
        ```
        \b(?:python|javascript|java|typescript|sql|html|css|php|c\+\+|c\#|rust|bash|regex|json)(?![\w+\#])
        \b(?:write|create|design|implement|debug)\b[^.?\n]{0,40}\b(?:code|program|script|function|query)\b
        \b(?:fix|modify|construct|generate|develop)\b[^.?\n]{0,40}\b(?:code|program|script|function|query)\b
        \b(?:algorithm|regular expression)\b
        代码|编程|程序|函数|算法|脚本
        \b(?:código|programa|programar|programación)\b
    """,
    "math": "",
    "roleplay": r"""
        \b(?:act as|pretend|role-?play|imagine (?:that )?you(?:'re| are)|assume the role|suppose you are|you are an? )
        扮演|假装|假设你|想象你|你是一[个名位]
        \b(?:actúa como|imagina que eres|finge)\b
    """,
    "classification": r"""
        \b(?:classif|categori[sz]|sentiment|sort the following|group the|rank the|odd one|true or false)
        \b(?:determine|decide|tell|check) (?:whether|if)\b
        \bidentify (?:whether|if|which|the (?:type|tone|odd))\b
        归类|分类|判断|情感|排序
        \bclasific
    """,
    "summarisation": r"""
        \b(?:summar|tl;dr|condense|shorten|main (?:idea|point))
        总结|摘要|概括|概述|缩短
        \bresum(?:e|ir|en)\b
    """,
    "extraction": r"""
        \b(?:extract|pull out|find (?:all|the|any)|identify|locate|highlight)\b
        \b(?:underline|retrieve|parse|count the|detect|spot the)\b
        提取|找出|识别|抽取|找到|指出|鉴定|辨别|确定
        \b(?:extra(?:e|er|iga)\b|identifi)
    """,
    "editing": r"""
        \b(?:re-?writ|rephras|paraphras|correct|proofread|revis|reword)
        \b(?:improv|convert|chang|transform|replac|modif|simplif)
        \b(?:rearrang|reorder|restructur|remov|delet|insert|combin|substitut|alter|adapt|expand|punctuat|capitali[sz])
        \b(?:edit|format|omit|complete|fill in|turn the|make the|add (?:a|an|the|more|some))\b
        改写|修改|替换|重组|变成|改进|优化|修复|扩展|简化|使用.{1,8}代替|纠正|重写|改成|改为|更正|转换|修正|编辑|润色|重新|添加|补充|填|完成|转化|删除|校对|调整|改变
        \b(?:reescrib|corrig|cambi|complet)
    """,
    "writing": rf"""
        \b(?:{_MAKE})\b[^.?\n]{{0,60}}\b(?:{_WORKS})s?\b
        ^(?:please )?(?:write|compose|draft)\b
        写|创作|撰写|作文|造句|起草|编一|生成|创建|创造|构造|编造
        \b(?:escrib|redact|compón)
    """,
    "brainstorming": r"""
        \b(?:list|suggest|recommend|brainstorm|come up with|propose|think of|offer|enumerate)\b
        \b(?:name|give|give me|give us|provide|provide me with) (?:an?|some|the|one|two|three|four)\b
        \b(?:name|give|give me|give us|provide|provide me with) (?:five|six|ten|\d+|examples?|ideas?|advice)\b
        \b(?:generate|create|design|plan|develop|produce|make an?|build|devise|prepare|invent|construct|outline)\b
        列出|建议|构建|构思|选择|开发|建立|组织|列举|推荐|提供|命名|给出|提出|设计|制定|计划|想出|说出|列表|举例|举出|起一个|起名
        \b(?:enumera|sugier|recomiend|propon|nombra|lista)
    """,
    "reasoning": r"""
        \b(?:why|if|cause|reason|logic)\b
        \b(?:predict|pros and cons|advantages|disadvantages|relationship between|what would happen)\b
        \b(?:compar|contrast|analy[sz]|evaluat|assess|deduc|infer)
        \b(?:argu|differen|criti[cq]|investigat|justif|distinguish|hypothes)
        为什么|比较|分析|评估|区别|评价|推理|优缺点|预测|原因|不同|对比|批评|推断|论证|讨论|影响
        \b(?:por qué|compar|analiz|evalú)
    """,
    "explanation": r"""
        \b(?:explain|describ|defin|elaborat|discuss|clarif|illustrat|interpret|specif|instruct)
        \b(?:how|what (?:is|are|does|do|was|were)|what's|tell me about|overview)\b
        \b(?:explanation|meaning|show me|state|detail)\b
        解释|描述|什么|如何|怎么|怎样|定义|介绍|说明|阐述|讲述|含义
        \b(?:explica|describ|defin|cómo|qué (?:es|son))
    """,
    "knowledge": r"""
        [?？]
        \b(?:who|when|where|which|what|name|tell|answer|find)\b
        谁|哪|吗|告诉|查找|回答|何时|多久|几
    """,
}

# Words that show which operation a word problem asks for.
MATH_CUES: dict[str, str] = {
    "comparison": r"""
        \b(?:more|fewer|less|older|younger|taller|longer|shorter)(?: \w+)? than\b
        \b(?:heavier|faster|greater|smaller|larger|higher|lower|bigger)(?: \w+)? than\b
        \b(?:twice|half|thrice) (?:as|the|of)\b|\btimes (?:more|older|bigger|larger|the|of)\b
        \bas (?:many|much|old|tall|long|far|big|fast|heavy)(?: \w+){0,3} as\b(?! before)|\bdifference\b
        \bhow (?:many|much) (?:more|fewer|less)\b
        \b(?:más|menos) que\b|\bveces (?:más|tant|lo que|la cantidad)
        \b(?:el doble|el triple|la mitad)\b|\bcuánt[oa]s? (?:más|menos)\b
        比.{1,12}[多少大小高低长短]|倍
    """,
    "division": r"""
        \b(?:divid|split|share[sd]? |sharing|equally|evenly|average|quotient|per person)
        \beach (?:person|friend|child|one) (?:get|receiv)
        \bhow many (?:groups|boxes|bags|packs|weeks|days) (?:will|would|can|does|do)\b
        \b(?:repart|divid|partes iguales|por igual|para cada amig)
        ÷|\d\s*/\s*\d|除以|平均|平分
    """,
    "multiplicative": r"""
        \b(?:every|apiece|multipl\w*|product of|doubles?|triples?|dozen|per|percent)\b|%
        \b(?:twice|thrice|times)\b(?! (?:as \w+(?: \w+){0,3} as\b(?! before)|more|older|bigger|larger|the|of))
        \beach\b(?! (?:person|friend|child|one)\b)
        \bcada un[oa]\b
        \b(?:cajas|bolsas|corrales|bandejas|estantes|paquetes|álbumes|filas) de \d|\bdocena
        \bveces\b(?! (?:más|tant|lo que|la cantidad))
        [×*]|\d\s*x\s*\d|乘|每|百分之
    """,
    "additive": r"""
        \b(?:gives?|gave|away|buys?|bought|finds?|found|loses?|lost|eats?)\b
        \b(?:ate|adds?|added|left|remain\w*|gets?|got|sells?|sold|receives?)\b
        \b(?:total|altogether|in all|more|sum|plus|minus|subtract\w*|spend\w*)\b
        \b(?:spent|together|combined|now|leaves?|uses?|used|takes?|took|puts?)\b
        \b(?:da|regala|compra|encuentra|pierde|come|total|quedan?|ahora|recibe|vende|gasta|usa|suma|resta|más)\b
        \d\s*[+−-]\s*\d|加|减|一共|总共|还剩|剩下
    """,
}

# Asking for a quantity; naming a calculation.
QUANTITY = r"""
    \bhow (?:many|much|long|old|far|tall|high|wide|large|big|fast|heavy|deep)\b
    \bcuánt[oa]s?\b
    \bfind (?:how|the)\b|\bwhat(?:'s| is| was| are| were| will be) (?:the|his|her|their|its|\w+'s)\b
    \bwhat (?:percent\w*|fraction|number|time|age)\b
    多少|几[个只本元人天年]
"""
CALCULATION = r"""
    \b(?:calculat|solve|simplif|factor|evaluate|equation|derivative|integral|square root)
    \b(?:average|sum|product|area|volume|perimeter) of\b
    \b(?:percent|probability|hypotenuse|multiply|subtract|divide|calcul)
    \bhow (?:many|much)\b|\bcuánt[oa]s\b
    计算|求解|解方程|方程|面积|平方根|概率
"""

CONSTRAINTS = r"""
    \b(?:must|at least|at most|no more than|no less than|exactly)\b
    \b(?:only|without|except|unless|fewer than|less than \d+ words)\b
    \b(?:should (?:not )?(?:be|include|contain|have|use)|make sure|ensure|includ(?:e|ing)|using)\b
    \b(?:do not|don't|limit|maximum|minimum)\b
    \b(?:avoid|each sentence|(?:start|end)(?:ing)? with|step by step|given that|such that)\b
    \b(?:based on|as if|suppose|instead|within|in under)\b
    \bin (?:one|two|three|\d+) (?:words?|sentences?|paragraphs?|steps?)\b
    \b(?:debe|al menos|como máximo|exactamente|sólo|solo|sin|excepto|incluye|usando|supón|en lugar|en cambio)\b
    必须|至少|最多|不超过|不少于|只能|不要|不能|使用|包括|包含|确保|避免|以内|限制|基于|按照|要求|用一句|假设
"""

NUMBERS = r"""
    \d+(?:[.,]\d+)*
    \b(?:two|three|four|five|six|seven|eight|nine|ten)\b
    \bone-\w+\b|\b(?:third|quarter|thrice|eleven|twelve|dozen|twenty|thirty|forty|fifty|hundred|thousand)\b
    \b(?:half|twice|double|triple|dos|tres|cuatro|cinco|seis|siete|ocho|nueve|diez|doce|veinte|doble|mitad)\b
    [一两二三四五六七八九十百千万]+[个只本元人天年次倍岁支块]
"""

CLAUSES = r"""
    [.!?;:,。！？；：，、]
    \b(?:and|but|if|when|which|that|because|so|then|while|who|where|y|pero|si|cuando|que|porque|luego|mientras)\b
    而且|但是|如果|因为|所以|然后|并且|以及|并
"""

STOP_WORDS: dict[str, str] = {
    "en": """
        the of and to in is that for it with as was on are this be by have from or an at what how which you
        your he she his her they many does has
    """,
    "es": """
        el la los las de del que en un una por con para se es su al lo como más pero cuántos cuántas
        tiene ahora qué cuál le da hay él ella
    """,
    "fr": """
        le la les des et en un une du que qui dans pour pas sur au avec est ce il elle vous nous combien
        quel quelle sont ses
    """,
    "de": """
        der die das und ist in den von zu mit sich auf für ein eine nicht es dem wie viele hat wird sind er
        sie
    """,
    "it": """
        il lo la gli le di che e un una per con non è del della sono come quanti ha più si
    """,
    "pt": """
        os as de do da que em um uma para com não é por mais como dos quantos tem ele ela seu
    """,
    "nl": """
        de het een en van in is dat op te met voor niet zijn er aan hoeveel heeft hij zij
    """,
}

# Words and characters that name no topic.
FILLER = """
    following given write create generate describe explain list give provide make find using use can please its
    those their them there some any all one two three four five about into more than then would could should input
    output each not also will may other most new get got tell name identify between own when were had been first our
    text
"""
FILLER_CHARACTERS = "的了是在和我你您他她它们这那有为以及与或而个一不就也都很会可将被把从到对中上下其之等"

TOXIC = r"""
    \b(?:idiots?|stupid|morons?|imbeciles?|dumb(?:ass)?|shut up)\b
    \b(?:damn(?:ed|it)?|fuck\w*|(?:bull)?shit\w*|bitch\w*|bastards?|assholes?)\b
    \b(?:retard(?:ed)?|whores?|sluts?|scum|losers|kill yourself|go to hell|hate you|pathetic|worthless)\b
    \b(?:idiotas?|estúpid[oa]s?|imbécil(?:es)?|mierda|put[oa]s?|cállate|maldit[oa]s?|tont[oa]s?|inútil(?:es)?)\b
    傻[逼瓜]|他妈|白痴|混蛋|去死|滚开|蠢货|婊子|贱人
"""
