"""What the synthetic pictures may show and what may be asked about them."""

from __future__ import annotations

TASKS = ("color", "shape", "count", "exist", "quadrant", "extreme", "relation", "letter", "sign", "kv", "line", "page")
SCENE_TASKS = TASKS[:9]

COLORS = {
    "red": (214, 40, 40),
    "green": (34, 150, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 218, 50),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "moon")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
QUADRANTS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # row, column
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost")
RELATIONS = ("left of", "right of", "above", "below")

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-/#$%+&!"  # the glyph atlas holds these, in this order
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O: hard to tell from 1 and 0
CODE_CHARACTERS = LETTERS + "0123456789"
MAX_LINES = 7  # lines one may ask for by number

KEYS = tuple(
    """
    total date name code price tax city phone room gate seat order weight size time model level unit batch route score
    rate item cash
    """.split()
)
WORDS = tuple(
    """
    ABLE ACID AGED ALSO AREA ARMY AWAY BABY BACK BALL BAND BANK BASE BATH BEAR BEAT BELL BELT BEST BIRD BLOW BLUE
    BOAT BODY BOND BONE BOOK BORN BOWL BULK BURN BUSH BUSY CAKE CALL CALM CAMP CARD CARE CASE CAST CELL CHAT CHIP
    CLUB COAL COAT COLD COME COOK COOL COPY CORE COST CREW CROP DARK DATA DAWN DEAL DEEP DESK DIAL DIET DISK DOOR
    DOWN DRAW DROP DUST DUTY EACH EARN EASE EAST EASY EDGE EVEN EVER FACE FACT FAIR FALL FARM FAST FATE FEAR FEED
    FEEL FILE FILL FILM FIND FINE FIRE FIRM FISH FLAT FLOW FOOD FOOT FORM FORT FOUR FREE FROM FUEL FULL FUND GAIN
    GAME GATE GEAR GIFT GIRL GIVE GLAD GOAL GOLD GOOD GRAY GROW HAIR HALF HALL HAND HARD HEAD HEAT HELP HERO HIGH
    HILL HOLD HOME HOPE HOUR HUGE IDEA INCH IRON JOIN JUMP JURY JUST KEEN KEEP KIND KING LADY LAKE LAND LAST LATE
    LEAD LEFT LIFE LIFT LINE LIST LOAD LOCK LONG LUCK MAIL MAIN MARK MEAL MILE MILK MIND MINE MOON MOVE NECK NEWS
    NICE NOTE OPEN OVEN PACK PAGE PAIR PARK PATH PEAK PLAN PLAY POET POOL PORT PURE RACE RAIN READ RICE RING RISK
    ROAD ROCK ROLE ROOF ROOT SAFE SALT SAND SEED SHIP SHOP SIGN SILK SNOW SOIL STAR STEP STOP TALK TEAM TENT TEST
    TIDE TOWN TREE TRIP TURN UNIT VIEW VOTE WALK WALL WARM WAVE WEEK WIND WINE WOOD WORK YEAR ANGLE APPLE BEACH
    BREAD BRICK BRIDGE BRUSH CABLE CHAIR CLOCK CLOUD COAST COPPER CORNER COTTON DESERT DOCTOR DRIVER ENGINE FABRIC
    FLOWER FOREST FRIEND GARDEN GLASS GRAIN GUITAR HAMMER HARBOR HORSE HOTEL ISLAND JACKET LEMON LETTER MARKET METAL
    MIRROR MONTH MOTOR NORTH NUMBER OCEAN OFFICE ORANGE PAPER PENCIL PEPPER PLANET PLATE POCKET POTATO RABBIT RIVER
    ROCKET SADDLE SCHOOL SHADOW SILVER SPRING STATION STONE STREET SUGAR SUMMER TABLE TICKET TIMBER TRAIN VALLEY
    VIOLET WATER WINDOW WINTER YELLOW BUTTER CASTLE CANDLE BASKET BOTTLE CAMERA CARPET CHEESE COFFEE DINNER FINGER
    """.split()
)


def all_questions() -> list[str]:
    """Every question the generator can ask; the tokenizer is built from these."""
    things = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    questions = [f"what color is the {shape}?" for shape in SHAPES]
    questions += [f"which shape is {color}?" for color in COLORS]
    questions += [f"how many {PLURALS[shape]} are there?" for shape in SHAPES]
    questions += [f"how many {color} objects are there?" for color in COLORS]
    questions += ["how many objects are there?", "what does the sign say?", "read the text."]
    questions += [f"what is at the {quadrant}?" for quadrant in QUADRANTS]
    questions += [f"which object is {extreme}?" for extreme in EXTREMES]
    questions += [f"is the {thing} {relation} the {thing}?" for thing in things for relation in RELATIONS]
    questions += [f"is there a {thing}?" for thing in things]
    questions += [f"what letter is on the {thing}?" for thing in things]
    questions += [f"locate the {thing}." for thing in things]
    questions += [f"what is the {key}?" for key in KEYS]
    questions += [f"read line {number}." for number in range(1, MAX_LINES + 1)]
    return questions
